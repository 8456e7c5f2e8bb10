"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer; llama.cpp's "qwen3moe".

Refused: layers without experts, and gates that are not normalised over the chosen experts,
since llama.cpp has the former not at all and always does the latter.
Sources: arXiv:2505.09388, llama.cpp's src/models/qwen3moe.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    expert_keys,
    experts,
    output,
)
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.qwen2 import DEFAULTS, FIXED, keys, notes
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, u32

_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj")


def _dims(config: Config) -> dict[str, int]:
    return {
        **attention_dims(config),
        "experts": integer(config, "num_experts", "num_local_experts"),
        "expert_ff": integer(config, "moe_intermediate_size"),
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION, *HEAD_NORMS, *_EXPERTS)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **keys(config, dims),
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        **decoder_config(header, "Qwen3MoeForCausalLM", "qwen3_moe"),
        **header.named(
            num_experts_per_tok="expert_used_count",
            num_experts="expert_count",
            moe_intermediate_size="expert_feed_forward_length",
        ),
        "norm_topk_prob": True,
    }


QWEN3_MOE = Architecture(
    name="qwen3moe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    read_notes=notes,
    defaults={**DEFAULTS, "norm_topk_prob": False},
    fixed={
        **FIXED,
        "attention_bias": (False,),
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=DECODER,
)
