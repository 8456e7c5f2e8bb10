"""DeepSeek V2, V3 and R1, Kimi K2, GLM-4.7-Flash: latent attention, experts; "deepseek2".

V2's router takes the softmax of the scores and ranks groups of experts by their best one, where
llama.cpp adds up the two best; V3's, and that of all that came after, takes the sigmoid, which
newly saved config.json files do not say, so it is the class that tells. GLM-4.7-Flash comes back
from a GGUF as DeepSeek V3, which computes the same, and a file without experts as Youtu.

Sources: arXiv:2405.04434, arXiv:2412.19437, transformers' modeling_deepseek_v2.py,
modeling_deepseek_v3.py and modeling_glm4_moe_lite.py, llama.cpp's src/models/deepseek2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, count
from quantcli.archs.decoder import EMBEDDING, NORMS, OUTPUT_NORM, output
from quantcli.archs.header import Header
from quantcli.archs.mixture import (
    SIGMOID,
    SOFTMAX,
    mixture_config,
    mixture_dims,
    mixture_keys,
    mixture_rules,
    sparse_rules,
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
from quantcli.archs.mtp import Mtp, behind, nextn_rules
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue

_FIXED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
}


def _dims(config: Config) -> dict[str, int]:
    return {**mla_dims(config), **mixture_dims(config)}


def _rules(config: Config) -> tuple[Rule, ...]:
    head = output(config)
    return (EMBEDDING, OUTPUT_NORM, head, *NORMS, *mla_rules(config), *mixture_rules(config))


def _v2_rules(config: Config) -> tuple[Rule, ...]:
    inside = (*mla_rules(config), *mixture_rules(config, bias=""))
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *inside)


def _v2_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return _keys(config if _is_limited(config) else {**config, "n_group": 1}, dims, gating=SOFTMAX)


def _is_limited(config: Config) -> bool:
    """Whether V2's choice is limited to some groups of experts."""
    groups = count(config, "n_group", default=1)
    chosen = count(config, "topk_group", default=groups)
    return config.get("topk_method") == "group_limited_greedy" and chosen < groups


def _block_rules(config: Config, blocks: range) -> tuple[Rule, ...]:
    inside = (*NORMS, *mla_rules(config), *sparse_rules(config), *nextn_rules(config))
    return behind(blocks, *inside)


def _keys(config: Config, dims: Dims, *, gating: int) -> dict[str, MetaValue]:
    return {**mla_keys(config, dims), **mixture_keys(config, dims, gating)}


def _v2_notes(config: Config) -> tuple[str, ...]:
    if not _is_limited(config):
        return mla_notes(config)
    return (
        *mla_notes(config),
        "DeepSeek V2's router ranks the groups of experts by the best expert of each, llama.cpp "
        "by the sum of the two best, so a token may visit other experts",
    )


def _config(header: Header) -> dict[str, Any]:
    if "expert_count" not in header.keys:
        return mla_config(header, "YoutuForCausalLM", "youtu")
    if header.keys.get("expert_gating_func", SOFTMAX) == SIGMOID:
        shared = mla_config(header, "DeepseekV3ForCausalLM", "deepseek_v3")
        return {**shared, **mixture_config(header)}
    found = mixture_config(header)
    limited = found["topk_group"] < found["n_group"]
    return {
        **mla_config(header, "DeepseekV2ForCausalLM", "deepseek_v2"),
        **found,
        "topk_method": "group_limited_greedy" if limited else "greedy",
    }


DEEPSEEK_V3 = Architecture(
    name="deepseek2",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=partial(_keys, gating=SIGMOID),
    to_config=_config,
    check=check_lite,
    read_notes=mla_notes,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    fixed={**_FIXED, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    mtp=Mtp("num_nextn_predict_layers", "model.layers.{i}.eh_proj.weight", _block_rules, most=1),
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=FOLDS,
)

GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    defaults={
        **DEEPSEEK_V3.defaults,
        "rms_norm_eps": 1e-5,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
    },
)

DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    read_rules=_v2_rules,
    to_keys=_v2_keys,
    mtp=None,
    read_notes=_v2_notes,
    defaults={
        **DEEPSEEK_V3.defaults,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
    },
    fixed={
        **_FIXED,
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
        "mlp_bias": (False,),
    },
)
