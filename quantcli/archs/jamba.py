"""Jamba: Mamba with attention and experts in every so many layers; llama.cpp's "jamba".

Attention knows no positions. The mixers norm the step, B and C. A layer without attention has 0
key-value heads in GGUF's list of them.

Refused: mixers that are not twice as wide as the stream, heads that do not fill it, biases of
projections and a convolution without one, which llama.cpp has not.
Sources: arXiv:2403.19887, transformers' modeling_jamba.py, llama.cpp's src/models/jamba.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    expert_keys,
    experts,
    layer,
    output,
)
from quantcli.archs.fold import HYBRID
from quantcli.archs.header import Header
from quantcli.archs.mamba_mixer import MAMBA1, mamba1, mamba1_dims, mamba1_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array

_NORMS = (
    layer("attn_norm.weight", "input_layernorm.weight", "hidden"),
    layer("ffn_norm.weight", "pre_ff_layernorm.weight", "hidden"),
)
_MIXER = (
    *mamba1("model.layers.{i}.mamba"),
    layer("ssm_dt_norm.weight", "mamba.dt_layernorm.weight", "ssm_rank"),
    layer("ssm_b_norm.weight", "mamba.b_layernorm.weight", "ssm_state"),
    layer("ssm_c_norm.weight", "mamba.c_layernorm.weight", "ssm_state"),
)
_MLP = tuple(replace(rule, source=rule.source.replace(".mlp.", ".feed_forward.")) for rule in MLP)
_EXPERTS = tuple(
    replace(rule, source=rule.source.replace(".feed_forward.gate.", ".feed_forward.router."))
    for rule in experts("feed_forward", "gate_proj", "up_proj", "down_proj")
)


def _every(config: Config, what: str) -> tuple[int, ...]:
    """The layers that come around with a period: "attn" or "expert"."""
    layers, period = integer(config, "num_hidden_layers"), integer(config, f"{what}_layer_period")
    offset = config.get(f"{what}_layer_offset")
    if not isinstance(offset, int) or not 0 <= offset < period:
        raise ArchitectureError(
            f"{what}_layer_offset of {class_name(config)} in config.json is {offset!r}, expected a "
            f"whole number below {what}_layer_period {period}"
        )
    return tuple(range(offset, layers, period))


def _mixed(config: Config) -> tuple[int, ...]:
    """The layers with experts, of which one is none."""
    return _every(config, "expert") if integer(config, "num_experts") > 1 else ()


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    return {
        **dims,
        **mamba1_dims(config, dims["hidden"]),
        "experts": integer(config, "num_experts"),
        "expert_ff": dims["ff"],
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    layers = range(integer(config, "num_hidden_layers"))
    attention, mixed = _every(config, "attn"), _mixed(config)
    parts = (
        (ATTENTION, attention),
        (_MIXER, sorted(set(layers) - set(attention))),
        (_EXPERTS, mixed),
        (_MLP, sorted(set(layers) - set(mixed))),
    )
    return (
        EMBEDDING,
        Rule("output_norm.weight", "model.final_layernorm.weight", ("hidden",)),
        output(config),
        *_NORMS,
        *(replace(rule, layers=where) for rules, where in parts for rule in rules),
    )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    attention = _every(config, "attn")
    heads = [dims["kv_heads"] if index in attention else 0 for index in range(dims["layers"])]
    return {
        **decoder_keys(config, dims),
        **mamba1_keys(dims),
        **(expert_keys(config, dims) if _mixed(config) else {}),
        "attention.head_count_kv": array("i32", heads),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "JambaForCausalLM", "jamba")
    del config["rope_parameters"]
    layers = config.get("num_hidden_layers", 0)
    heads = header.keys.get("attention.head_count_kv", [])
    attention = [index for index, count in enumerate(heads) if count]
    mixed = [i for i in range(layers) if f"blk.{i}.ffn_gate_inp.weight" in header.shapes]
    return {
        **config,
        "num_experts": 1,
        **header.named(
            num_experts="expert_count", num_experts_per_tok="expert_used_count", **MAMBA1
        ),
        "num_key_value_heads": max(heads, default=0),
        **_period("attn", attention, layers),
        **_period("expert", mixed, layers),
    }


def _period(what: str, found: Sequence[int], layers: int) -> dict[str, int]:
    """Where the first of some layers is, and after how many the next comes."""
    first = found[0] if found else layers
    period = found[1] - first if len(found) > 1 else layers + 1
    return {f"{what}_layer_offset": first, f"{what}_layer_period": period}


JAMBA = Architecture(
    name="jamba",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        **dict(zip(MAMBA1, (4, 16, "auto"), strict=True)),
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "mamba_expand": (2,),
        "mamba_conv_bias": (True,),
        "mamba_proj_bias": (False,),
    },
    renames=((r"\.moe\.", ".feed_forward."),),
    folds=HYBRID,
)
