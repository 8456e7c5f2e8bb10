"""Falcon-H1: attention and Mamba-2 beside one another in every layer; llama.cpp's "falcon-h1".

Its many multipliers (of embeddings, logits, keys, the MLP's gate and output, what goes in and out
of attention and mixer, and the five parts of the mixer's input matrix) have no key-values: they
are multiplied into the weights, as llama.cpp's converter does, and a model read back from a GGUF
has them all at 1. llama.cpp calls the norm before the MLP by a name without ".weight".

Refused: biases of projections, a mixer's norm before its gate, limits of time steps, and one matrix
for embeddings and output where their multipliers differ.
Sources: TII's model cards, arXiv:2507.22448, transformers' modeling_falcon_h1.py, llama.cpp's
src/models/falcon-h1.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, flag, integer, number
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    attention_dims,
    decoder_config,
    decoder_keys,
    layer,
    output,
)
from quantcli.archs.fold import HYBRID
from quantcli.archs.header import Header
from quantcli.archs.mamba_mixer import (
    MAMBA2,
    STEP_LIMITS,
    mamba2,
    mamba2_config,
    mamba2_dims,
    mamba2_keys,
)
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.errors import ArchitectureError
from quantcli.pieces import Multiply
from quantcli.types import MetaValue

_LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}
_SINGLE = (
    "embedding_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier",
    "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
)  # fmt: skip
_NORMS = (
    layer("attn_norm.weight", "input_layernorm.weight", "hidden"),
    layer("ffn_norm", "pre_ff_layernorm.weight", "hidden"),
)
_MLP = tuple(replace(rule, source=rule.source.replace(".mlp.", ".feed_forward.")) for rule in MLP)
_PARTS = ("z", "x", "b", "c", "dt", "ssm_in")
"""Where the parts of the mixer's input matrix begin, and its end."""


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    if config.get("mamba_d_ssm") is None:
        inner = integer(config, "mamba_expand") * dims["hidden"]
    else:
        inner = integer(config, "mamba_d_ssm")
    dims |= mamba2_dims(config, dims["hidden"], inner)
    states = dims["ssm_groups"] * dims["ssm_state"]
    starts = (0, inner, 2 * inner, 2 * inner + states, 2 * inner + 2 * states)
    return {**dims, **dict(zip(_PARTS, starts, strict=False))}


def _multipliers(config: Config) -> dict[str, float]:
    """By the GGUF tensor's name without its ending; the mixer's input by its parts."""
    one = {name: number(config, name) for name in _SINGLE}
    gate, down = _list(config, "mlp_multipliers")
    attention = one["attention_in_multiplier"]
    found = {
        "token_embd": one["embedding_multiplier"],
        "output": one["lm_head_multiplier"],
        "attn_q": attention,
        "attn_k": attention * one["key_multiplier"],
        "attn_v": attention,
        "attn_output": one["attention_out_multiplier"],
        "ffn_gate": gate,
        "ffn_down": down,
        "ssm_out": one["ssm_out_multiplier"],
    }
    parts = zip(_PARTS, _list(config, "ssm_multipliers"), strict=False)
    found |= {part: value * one["ssm_in_multiplier"] for part, value in parts}
    if 0 in found.values():
        raise ArchitectureError(f"a multiplier of {class_name(config)} in config.json is 0")
    return found


def _list(config: Config, name: str) -> list[float]:
    count = _LISTS[name]
    found = config.get(name) or [1.0] * count
    if not isinstance(found, list) or len(found) != count:
        raise ArchitectureError(
            f"{name} of {class_name(config)} in config.json is {found!r}, expected {count} numbers"
        )
    return [number({**config, name: value}, name) for value in found]


def _rules(config: Config) -> tuple[Rule, ...]:
    norm = flag(config, "mamba_rms_norm")
    rules = (
        EMBEDDING,
        Rule("output_norm.weight", "model.final_layernorm.weight", ("hidden",)),
        output(config),
        *_NORMS, *ATTENTION, *_MLP,
        *(
            rule
            for rule in mamba2("model.layers.{i}.mamba")
            if norm or rule.name != "blk.{i}.ssm_norm.weight"
        ),
    )  # fmt: skip
    factors = _multipliers(config)
    return tuple(_multiplied(rule, factors) for rule in rules)


def _multiplied(rule: Rule, factors: dict[str, float]) -> Rule:
    """The rule with its multiplier, if that is not 1."""
    stem = rule.name.removeprefix("blk.{i}.").removesuffix(".weight")
    if stem == "ssm_in":
        each = [factors[part] for part in _PARTS[:-1]]
        ranges = zip(_PARTS, _PARTS[1:], each, strict=False)
        parts = tuple(
            Part(rule.shape, cut=((0, start, stop),), pointwise=_factor(value))
            for start, stop, value in ranges
        )
        return rule if set(each) == {1.0} else replace(rule, parts=parts)
    return replace(rule, pointwise=_factor(factors[stem])) if stem in factors else rule


def _factor(value: float) -> Multiply | None:
    return None if value == 1 else Multiply(value)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(read_rope(config, ("default", "linear"))),
        **mamba2_keys(dims),
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        **decoder_config(header, "FalconH1ForCausalLM", "falcon_h1"),
        **mamba2_config(header),
        **header.named(mamba_d_ssm="ssm.inner_size"),
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in header.shapes,
        "mamba_norm_before_gate": False,
    }


def _check(config: Config, dims: Dims) -> None:
    if flag(config, "mamba_rms_norm") and flag(config, "mamba_norm_before_gate"):
        raise ArchitectureError(
            f"config.json of {class_name(config)} sets mamba_norm_before_gate to true, but "
            "llama.cpp gates before it norms"
        )
    factors = _multipliers(config)
    tied = flag(config, "tie_word_embeddings") and factors["token_embd"] != factors["output"]
    if tied:
        raise ArchitectureError(
            f"config.json of {class_name(config)} ties the output to the embeddings and sets "
            f"embedding_multiplier to {factors['token_embd']:g} but lm_head_multiplier to "
            f"{factors['output']:g}; llama.cpp has one matrix for both, without multipliers"
        )


FALCON_H1 = Architecture(
    name="falcon-h1",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "mamba_expand": 2,
        **dict(zip(MAMBA2, (4, 256, 128, 1), strict=True)),
        "mamba_rms_norm": False,
        "mamba_norm_before_gate": True,
        **dict.fromkeys(_SINGLE, 1.0),
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "mamba_proj_bias": (False,),
        "projectors_bias": (False,),
        "mamba_conv_bias": (True,),
        "time_step_limit": STEP_LIMITS,
    },
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.mup_vector"),
    folds=replace(HYBRID, basis="llama.cpp gives the norm before its MLP a name of its own"),
)
