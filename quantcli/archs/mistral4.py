"""Mistral Small 4: latent attention, experts in a stack; llama.cpp's "mistral4".

As DeepSeek V3, with a softmax over the experts, and with attention that is sharpened by the
logarithm of the position beyond the original context (``llama_4_scaling_beta``).

Refused: another mscale of YaRN than 1, which llama.cpp takes for granted here.
Sources: Mistral's model card, transformers' modeling_mistral4.py, llama.cpp's
src/models/mistral4.cpp and deepseek2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer, number
from quantcli.archs.decoder import EMBEDDING, NORMS, OUTPUT_NORM, layer, output
from quantcli.archs.header import Header
from quantcli.archs.mixture import (
    SOFTMAX,
    mixture_config,
    mixture_dims,
    mixture_keys,
    mixture_rules,
)
from quantcli.archs.mla import (
    FOLDS,
    check_lite,
    mla_config,
    mla_dims,
    mla_keys,
    mla_notes,
    mla_rules,
)
from quantcli.archs.rope import Rope, read_rope
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, f32, u32

_SCALE, _LENGTH = "attention.temperature_scale", "attention.temperature_length"
_HALVES = ("experts", 2, "expert_ff", "hidden")


def _half(name: str, index: int) -> Rule:
    rule = layer(name, "mlp.experts.gate_up_proj", "experts", "expert_ff", "hidden")
    part = Part(_HALVES, cut=((1, index, index + 1),))
    return replace(rule, stored=("experts", "gate_up", "hidden"), parts=(part,))


_STACKS = {
    "blk.{i}.ffn_gate_exps.weight": _half("ffn_gate_exps.weight", 0),
    "blk.{i}.ffn_up_exps.weight": _half("ffn_up_exps.weight", 1),
    "blk.{i}.ffn_down_exps.weight": layer(
        "ffn_down_exps.weight", "mlp.experts.down_proj", "experts", "hidden", "expert_ff"
    ),
}
"""Experts as the checkpoints hold them."""


def _dims(config: Config) -> dict[str, int]:
    dims = {**mla_dims(config), **mixture_dims(config)}
    return {**dims, "gate_up": 2 * dims["expert_ff"]}


def _rules(config: Config) -> tuple[Rule, ...]:
    mixture = (
        replace(_STACKS[rule.name], layers=rule.layers) if rule.name in _STACKS else rule
        for rule in mixture_rules(config, bias="")
    )
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *mla_rules(config), *mixture)


def _rope(config: Config) -> Rope:
    rope = read_rope(config, ("default", "yarn"), partial=True)
    rotated = integer(config, "qk_rope_head_dim")
    whole = rotated + integer(config, "qk_nope_head_dim")
    share = number(rope, "partial_rotary_factor", default=rotated / whole)
    mscales = [number(rope, key, default=1.0) for key in ("mscale", "mscale_all_dim")]
    if int(whole * share) != rotated or mscales != [1, 1]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} sets partial_rotary_factor to {share:g} and "
            f"mscale and mscale_all_dim to {mscales[0]:g} and {mscales[1]:g}, but llama.cpp "
            f"rotates the {rotated} values of qk_rope_head_dim, with 1 for either mscale"
        )
    return rope


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = _rope(config)
    keys = {**mla_keys(config, dims, rope), **mixture_keys(config, dims, SOFTMAX)}
    beta = number(rope, "llama_4_scaling_beta", default=0.0)
    if beta:
        keys[_SCALE] = f32(beta)
        keys[_LENGTH] = u32(integer(rope, "original_max_position_embeddings"))
    return keys


def _config(header: Header) -> dict[str, Any]:
    config = mla_config(header, "Mistral4ForCausalLM", "mistral4")
    rope = config["rope_parameters"]
    rope["llama_4_scaling_beta"] = header.keys.get(_SCALE, 0.0)
    length = header.keys.get(_LENGTH, config.get("max_position_embeddings"))
    rope.setdefault("original_max_position_embeddings", length)
    return {**config, **mixture_config(header)}


def _notes(config: Config) -> tuple[str, ...]:
    return mla_notes(config, _rope(config))


MISTRAL4 = Architecture(
    name="mistral4",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_lite,
    read_notes=_notes,
    defaults={
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "kv_lora_rank": 256,
        "q_lora_rank": 1024,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 1048576,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "rope_interleave": (True,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=FOLDS,
)
