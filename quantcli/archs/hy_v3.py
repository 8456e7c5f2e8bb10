"""Hy3 (Hunyuan V3): normed heads, DeepSeek V3's router and experts; llama.cpp's "hy_v3".

Published files name the parts otherwise than transformers does in memory; either is read.
Sources: Tencent's model card, transformers' modeling_hy_v3.py, llama.cpp's src/models/hy-v3.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    output,
)
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
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, u32

_NAMES = MixtureNames(
    experts="num_experts",
    shared="num_shared_experts",
    scale="router_scaling_factor",
)


def _dims(config: Config) -> dict[str, int]:
    return {**attention_dims(config), **mixture_dims(config, _NAMES)}


_PLACES = {"gate": "router.gate", "bias": "expert_bias", "shared": "shared_mlp"}
_LAYER = (*NORMS, *ATTENTION, *HEAD_NORMS)


def _rules(config: Config) -> tuple[Rule, ...]:
    mixture = map(_named, mixture_rules(config, _NAMES, **_PLACES))
    return (EMBEDDING, OUTPUT_NORM, output(config), *_LAYER, *mixture)


def _block_rules(config: Config, blocks: range) -> tuple[Rule, ...]:
    inside = map(_named, (*sparse_rules(config, _NAMES, **_PLACES), *nextn_rules(config)))
    return behind(blocks, *_LAYER, *inside)


def _named(rule: Rule) -> Rule:
    """The rule as this family's tensors are called, here and in llama.cpp."""
    if rule.name == "blk.{i}.exp_probs_b.bias":
        return replace(rule, name="blk.{i}.exp_probs_b")
    if rule.name == "blk.{i}.nextn.shared_head_norm.weight":
        return replace(rule, source="model.layers.{i}.final_layernorm.weight")
    return rule


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(read_rope(config, ("default",))),
        **mixture_keys({**config, "norm_topk_prob": True}, dims, SIGMOID, _NAMES),
        "expert_shared_feed_forward_length": u32(dims["shared_ff"]),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "HYV3ForCausalLM", "hy_v3")
    found = mixture_config(header, _NAMES)
    width = header.keys.get("expert_feed_forward_length", 1)
    shared = header.keys.get("expert_shared_feed_forward_length", width)
    layers = int(config.get("num_hidden_layers", 1))
    dense = sum(f"blk.{i}.ffn_gate_inp.weight" not in header.shapes for i in range(layers))
    unused = ("n_group", "topk_group", "norm_topk_prob", _NAMES.dense)
    return {
        **config,
        **{key: value for key, value in found.items() if key not in unused},
        _NAMES.shared: shared // width,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
    }


HY_V3 = Architecture(
    name="hy_v3",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 11158840.0,
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "num_experts": 192,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1536,
        "router_scaling_factor": 2.826,
        "first_k_dense_replace": 1,
    },
    mtp=Mtp("num_nextn_predict_layers", "model.layers.{i}.eh_proj.weight", _block_rules, most=1),
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "route_norm": (True,),
        "moe_router_use_sigmoid": (True,),
        "qk_norm": (True,),
    },
    renames=(
        (r"\.mlp\.gate\.weight$", ".mlp.router.gate.weight"),
        (r"\.mlp\.e_score_correction_bias$", ".mlp.expert_bias"),
        (r"\.mlp\.shared_experts\.", ".mlp.shared_mlp."),
    ),
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=FOLDS,
)
