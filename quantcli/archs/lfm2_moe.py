"""LFM2-8B-A1B and LFM2-24B-A2B: LFM2 with experts behind the first layers; "lfm2moe".

The router's sigmoid scores are weighed as they are, normalised over the chosen experts, while a
bias that is stored beside the router has its say in the choice alone.

Refused: routers without that bias, scores that are not normalised and factors on them, of which
llama.cpp has none.
Sources: Liquid AI's model cards, transformers' modeling_lfm2_moe.py, llama.cpp's
src/models/lfm2moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import check_square, expert_keys, experts, layer
from quantcli.archs.header import Header
from quantcli.archs.lfm2 import (
    DEFAULTS,
    FEED_FORWARD,
    FIXED,
    FOLDS,
    keys,
    mixer_dims,
    rebuilt,
    rules,
)
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_EXPERTS = (
    *experts("feed_forward", "w1", "w3", "w2"),
    layer("exp_probs_b.bias", "feed_forward.expert_bias", "experts"),
)
_SIGMOID = 2
"""LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID of llama.cpp."""


def _dense(config: Config) -> int:
    """How many layers at the beginning have no experts."""
    layers, dense = integer(config, "num_hidden_layers"), config.get("num_dense_layers")
    if not isinstance(dense, int) or not 0 <= dense < layers:
        raise ArchitectureError(
            f"num_dense_layers of {class_name(config)} in config.json is {dense!r}, expected a "
            f"whole number below its {layers} layers"
        )
    return dense


def _dims(config: Config) -> dict[str, int]:
    return {
        **mixer_dims(config),
        "experts": integer(config, "num_experts"),
        "expert_ff": integer(config, "moe_intermediate_size"),
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    dense, layers = _dense(config), integer(config, "num_hidden_layers")
    return rules(
        config,
        *(replace(rule, layers=range(dense)) for rule in FEED_FORWARD),
        *(replace(rule, layers=range(dense, layers)) for rule in _EXPERTS),
    )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **keys(config, dims),
        **expert_keys(config, dims),
        "leading_dense_block_count": u32(_dense(config)),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "expert_gating_func": u32(_SIGMOID),
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        **rebuilt(header, "Lfm2MoeForCausalLM", "lfm2_moe"),
        **header.named(
            num_dense_layers="leading_dense_block_count",
            num_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            moe_intermediate_size="expert_feed_forward_length",
        ),
    }


LFM2_MOE = Architecture(
    name="lfm2moe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={**DEFAULTS, "num_dense_layers": 2},
    fixed={
        **FIXED,
        "use_expert_bias": (True,),
        "norm_topk_prob": (True,),
        "routed_scaling_factor": (1.0,),
    },
    folds=FOLDS,
)
