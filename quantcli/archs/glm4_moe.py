"""GLM-4.5, 4.6 and 4.7: grouped-query attention and DeepSeek V3's experts; llama.cpp's "glm4moe".

Half of each head is rotated, by halves; the largest model has norms on the heads of q and k. The
text models of GLM-4.5V and 4.6V are the same with a rotation shared out among time, height and
width.
Sources: arXiv:2508.06471, transformers' modeling_glm4_moe.py, llama.cpp's src/models/glm4-moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, flag
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    biased,
    decoder_config,
    decoder_keys,
    output,
    partial_config,
    partial_rotation,
)
from quantcli.archs.fold import FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.mixture import (
    FOLDS,
    SIGMOID,
    mixture_config,
    mixture_dims,
    mixture_keys,
    mixture_rules,
    sparse_rules,
)
from quantcli.archs.mtp import Mtp, behind, nextn_rules
from quantcli.archs.rope import Rope, read_rope, rope_keys, section_config, section_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.wrappers import unwrapped
from quantcli.types import MetaValue, u32

_NORMS = (NORMS[0], replace(NORMS[1], name="blk.{i}.post_attention_norm.weight"))


def _dims(config: Config) -> dict[str, int]:
    return {**attention_dims(config), **mixture_dims(config)}


def _rope(config: Config) -> Rope:
    rope = read_rope(config, ("default", "mrope", "yarn"), partial=True, sections=True)
    return {**rope, "rope_type": "default"} if rope["rope_type"] == "mrope" else rope


def _attention(config: Config) -> tuple[Rule, ...]:
    qkv = biased(*ATTENTION[:3]) if flag(config, "attention_bias") else ATTENTION[:3]
    head_norms = HEAD_NORMS if flag(config, "use_qk_norm") else ()
    return (*_NORMS, *qkv, ATTENTION[3], *head_norms)


def _rules(config: Config) -> tuple[Rule, ...]:
    inside = (*_attention(config), *mixture_rules(config))
    return (EMBEDDING, OUTPUT_NORM, output(config), *inside)


def _block_rules(config: Config, blocks: range) -> tuple[Rule, ...]:
    inside = (*_attention(config), *sparse_rules(config), *nextn_rules(config))
    return behind(blocks, *inside)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = _rope(config)
    rotated = partial_rotation(rope, dims)
    return {
        **decoder_keys(config, dims),
        **rope_keys(rope),
        "rope.dimension_count": u32(rotated),
        **(section_keys(rope, rotated // 2) if "mrope_section" in rope else {}),
        **mixture_keys(config, dims, SIGMOID),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "Glm4MoeForCausalLM", "glm4_moe")
    return {
        **config,
        **mixture_config(header),
        "rope_parameters": partial_config(config, header) | section_config(header),
        "attention_bias": "blk.0.attn_q.bias" in header.shapes,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in header.shapes,
    }


def _normed(rule: FoldRule) -> FoldRule:
    if rule.producers != ("blk.{i}.ffn_norm",):
        return rule
    return replace(rule, producers=("blk.{i}.post_attention_norm",))


GLM4_MOE = Architecture(
    name="glm4moe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    mtp=Mtp("num_nextn_predict_layers", "model.layers.{i}.eh_proj.weight", _block_rules, most=1),
    fixed={"hidden_act": ("silu", "swish"), "scoring_func": ("sigmoid",)},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=Folds(tuple(map(_normed, FOLDS.rules)), FOLDS.writers, FOLDS.basis),
)

GLM4V_MOE = replace(unwrapped(GLM4_MOE), defaults={**GLM4_MOE.defaults, "attention_bias": True})

SOLAR = replace(
    GLM4_MOE,
    defaults={
        **GLM4_MOE.defaults,
        "rope_theta": 1000000.0,
        "partial_rotary_factor": 1.0,
        "first_k_dense_replace": 0,
        "intermediate_size": 10240,
    },
)
"""Solar Open: no dense layers, whole heads rotated."""
