"""Qwen1.5-MoE and Qwen2-57B: Qwen2 with experts and one that every token visits; "qwen2moe".

Refused: layers without experts, and gates that are normalised over the chosen experts, of which
llama.cpp has neither.
Sources: arXiv:2407.10671, transformers' modeling_qwen2_moe.py, llama.cpp's src/models/qwen2moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    check_square,
    decoder_config,
    expert_keys,
    experts,
    layer,
)
from quantcli.archs.fold import Folds
from quantcli.archs.header import Header
from quantcli.archs.qwen2 import BIASES, DEFAULTS, FIXED, keys, notes
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, u32

_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj")
SHARED_EXPERT = (
    replace(
        layer("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", "hidden"),
        stored=(1, "hidden"),
    ),
    layer("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight", "shared_ff", "hidden"),
    layer("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight", "shared_ff", "hidden"),
    layer("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight", "hidden", "shared_ff"),
)


def _dims(config: Config) -> dict[str, int]:
    return {
        **attention_dims(config),
        "experts": integer(config, "num_experts"),
        "expert_ff": integer(config, "moe_intermediate_size"),
        "shared_ff": integer(config, "shared_expert_intermediate_size"),
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, OUTPUT, *NORMS, *ATTENTION, *BIASES, *_EXPERTS, *SHARED_EXPERT)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **keys(config, dims),
        **mixture_keys(config, dims),
    }


def mixture_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """The key-values of experts beside one that every token visits."""
    return {
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "expert_shared_feed_forward_length": u32(dims["shared_ff"]),
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        **decoder_config(header, "Qwen2MoeForCausalLM", "qwen2_moe"),
        **header.named(
            num_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            moe_intermediate_size="expert_feed_forward_length",
            shared_expert_intermediate_size="expert_shared_feed_forward_length",
        ),
        "norm_topk_prob": False,
    }


QWEN2_MOE = Architecture(
    name="qwen2moe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    read_notes=notes,
    defaults=DEFAULTS,
    fixed={
        **FIXED,
        "qkv_bias": (True,),
        "norm_topk_prob": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
        "tie_word_embeddings": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=Folds(),
)
