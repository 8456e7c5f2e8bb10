"""Ling and Ring 2.0 (Bailing V2): fused q, k, v with normed heads, DeepSeek V3's router;
llama.cpp's "bailingmoe2".

A part of each head is rotated, by halves. The class is not in transformers but comes as code with
the checkpoints, which quantcli does not run, so such a model is not calibrated; what it computes
is GLM-4.5's function.

Refused: heads that do not fill the hidden size, and biases, of which llama.cpp has neither.
Sources: inclusionAI's modeling_bailing_moe_v2.py, llama.cpp's src/models/bailingmoe2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name
from quantcli.archs.decoder import (
    EMBEDDING,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
    partial_config,
    partial_rotation,
)
from quantcli.archs.fold import FUSED, Folds
from quantcli.archs.header import Header
from quantcli.archs.mixture import (
    FOLDS,
    SIGMOID,
    MixtureNames,
    mixture_config,
    mixture_dims,
    mixture_keys,
    mixture_rules,
    sparse_rules,
)
from quantcli.archs.mtp import Mtp, behind, nextn_rules
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_NAMES = MixtureNames(experts="num_experts", shared="num_shared_experts")
_SHARED = "moe_shared_expert_intermediate_size"
_ATTENTION = (
    layer("attn_qkv.weight", "attention.query_key_value.weight", "qkv", "hidden"),
    layer("attn_q_norm.weight", "attention.query_layernorm.weight", "head_dim"),
    layer("attn_k_norm.weight", "attention.key_layernorm.weight", "head_dim"),
    layer("attn_output.weight", "attention.dense.weight", "hidden", "q"),
)
_VALUES = next(rule for rule in FUSED.rules if rule.kind == "values")


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    return {**dims, **mixture_dims(config, _NAMES), "qkv": dims["q"] + 2 * dims["kv"]}


def _check(config: Config, dims: Dims) -> None:
    check_square(config, dims)
    width = config.get(_SHARED)
    if width is not None and width != dims["expert_ff"]:
        raise ArchitectureError(
            f"{_SHARED} of {class_name(config)} in config.json is {width!r}, but its code gives "
            f"shared experts the width of the others, {dims['expert_ff']}"
        )


def _rope(config: Config) -> Rope:
    return read_rope(config, ("default", "yarn"), partial=True)


def _rules(config: Config) -> tuple[Rule, ...]:
    embedding = replace(EMBEDDING, source="model.word_embeddings.weight")
    mixture = mixture_rules(config, _NAMES, bias="gate.expert_bias")
    return (embedding, OUTPUT_NORM, OUTPUT, *NORMS, *_ATTENTION, *mixture)


def _block_rules(config: Config, blocks: range) -> tuple[Rule, ...]:
    """A layer with experts, and how the block begins and ends; llama.cpp does not run it."""
    ends = layer("layer_output_norm.weight", "final_layernorm.weight", "hidden")
    inside = sparse_rules(config, _NAMES, bias="gate.expert_bias")
    return behind(blocks, *NORMS, *_ATTENTION, *inside, *nextn_rules(config), ends)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(_rope(config)),
        "rope.dimension_count": u32(partial_rotation(_rope(config), dims)),
        **mixture_keys(config, dims, SIGMOID, _NAMES),
        "expert_shared_feed_forward_length": u32(dims["expert_ff"]),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "BailingMoeV2ForCausalLM", "bailing_moe_v2")
    rope = partial_config(config, header)
    return {
        **config,
        **mixture_config(header, _NAMES),
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "score_function": "sigmoid",
        "use_qk_norm": True,
    }


BAILING_MOE2 = Architecture(
    name="bailingmoe2",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 600000.0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    mtp=Mtp("num_nextn_predict_layers", "model.layers.{i}.eh_proj.weight", _block_rules),
    fixed={
        "hidden_act": ("silu", "swish"),
        "use_bias": (False,),
        "use_qkv_bias": (False,),
        "use_qk_norm": (True,),
        "use_rmsnorm": (True,),
        "norm_topk_prob": (True,),
        "score_function": ("sigmoid",),
        "moe_router_enable_expert_bias": (True,),
        "tie_word_embeddings": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=Folds(
        tuple(_VALUES if rule.kind == "values" else rule for rule in FOLDS.rules),
        FOLDS.writers,
        FOLDS.basis,
    ),
)
