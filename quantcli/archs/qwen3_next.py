"""Qwen3-Next: gated delta nets and attention, with experts in every layer; llama.cpp's "qwen3next".

One stored matrix makes queries, keys, values and gates of the delta net, key head by key head;
llama.cpp has the gates apart and the others one after another. config.json does not say that a
block for multi-token prediction follows the layers.

Refused: layers without experts, and gates that are not normalised over the chosen experts.
Sources: `quantcli.archs.delta_net`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs import delta_net
from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, integer
from quantcli.archs.decoder import layer
from quantcli.archs.header import Header
from quantcli.archs.qwen2_moe import mixture_keys
from quantcli.archs.rope import read_rope
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.pieces import NegativeExp
from quantcli.types import MetaValue

_FUSED = ("key_heads", "qkvz_head", "hidden")


def _dims(config: Config) -> dict[str, int]:
    dims = delta_net.mixer_dims(config)
    own = dims["sharers"] * dims["state"]
    return {
        **dims,
        "experts": integer(config, "num_experts"),
        "keys_head": 2 * dims["state"],
        "qkv_head": 2 * dims["state"] + own,
        "qkvz_head": 2 * dims["state"] + 2 * own,
        "qkvz": dims["qkv"] + dims["value"],
        "ba": 2 * dims["value_heads"],
    }


_QKVZ = "linear_attn.in_proj_qkvz.weight"
_DELTA_NET = (
    replace(
        layer("attn_qkv.weight", _QKVZ, "qkv", "hidden"),
        stored=("qkvz", "hidden"),
        parts=(
            Part(_FUSED, cut=((1, 0, "state"),)),
            Part(_FUSED, cut=((1, "state", "keys_head"),)),
            Part(_FUSED, cut=((1, "keys_head", "qkv_head"),)),
        ),
    ),
    replace(
        layer("attn_gate.weight", _QKVZ, "value", "hidden"),
        stored=("qkvz", "hidden"),
        parts=(Part(_FUSED, cut=((1, "qkv_head", "qkvz_head"),)),),
    ),
    layer("ssm_ba.weight", "linear_attn.in_proj_ba.weight", "ba", "hidden"),
    replace(
        layer("ssm_conv1d.weight", "linear_attn.conv1d.weight", "qkv", "kernel"),
        stored=("qkv", 1, "kernel"),
    ),
    replace(layer("ssm_a", "linear_attn.A_log", "value_heads"), pointwise=NegativeExp()),
    layer("ssm_dt.bias", "linear_attn.dt_bias", "value_heads"),
    *delta_net.DELTA_NET,
)


def _rules(config: Config) -> tuple[Rule, ...]:
    return delta_net.rules(config, _DELTA_NET, delta_net.EXPERTS)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = read_rope(config, delta_net.ROPE_TYPES, partial=True)
    return {**delta_net.keys(config, dims, rope), **mixture_keys(config, dims)}


def _config(header: Header) -> dict[str, Any]:
    return {
        **delta_net.rebuilt(header, "Qwen3NextForCausalLM", "qwen3_next"),
        **delta_net.rebuilt_experts(header),
        "norm_topk_prob": True,
    }


QWEN3_NEXT = Architecture(
    name="qwen3next",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={**delta_net.DEFAULTS, "norm_topk_prob": True},
    fixed={
        **delta_net.FIXED,
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
    },
    renames=delta_net.RENAMES,
    folds=delta_net.FOLDS,
    mtp=delta_net.mtp(delta_net.EXPERTS),
)
