"""Granite with a sliding window in most layers, dense and with experts; llama.cpp's "granite_swa".

Each head of every layer has a sink. Some layers may not be rotated; the others have one base.
Refused: several bases of the rotation.
Sources: transformers' modeling_granite_swa.py and modeling_granitemoe_swa.py, llama.cpp's
src/models/granite-swa.cpp.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer, listing, positive
from quantcli.archs.decoder import attention_dims, decoder_config, layer
from quantcli.archs.fold import Folds
from quantcli.archs.granite import DEFAULTS, FIXED, IGNORED, keys
from quantcli.archs.granite_config import MULTIPLIERS, SHARED
from quantcli.archs.granite_moe import EXPERTS, around, mixture_dims, mixture_keys
from quantcli.archs.header import Header
from quantcli.archs.llama import rules
from quantcli.archs.rope import read_rope
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.windows import layer_kinds, window_config, window_keys
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array

_EVERY = 4
_ROTATED = "attention.rope_pattern"
_SINKS = layer("attn_sinks.weight", "self_attn.sinks", "heads")
_SHARED = (
    layer("ffn_up_shexp.weight", "shared_mlp.input_linear.weight", "2shared_ff", "hidden"),
    layer("ffn_down_shexp.weight", "shared_mlp.output_linear.weight", "hidden", "shared_ff"),
)


_NAMES = {
    "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
    "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
    "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
}
"""What Granite 3 calls experts and router, and this class."""


def _renamed(rule: Rule) -> Rule:
    source = rule.source
    for before, after in _NAMES.items():
        source = source.replace(before, after)
    return replace(rule, source=source)


_EXPERTS = tuple(map(_renamed, EXPERTS))


def _kinds(config: Config, layers: int) -> list[str]:
    usual = ["sliding_attention" if i % _EVERY else "full_attention" for i in range(layers)]
    return layer_kinds(config, layers, usual)


def _base(config: Config) -> float:
    """The one base that all layers that are rotated have."""
    own = positive(read_rope(config, ("default", "linear", "llama3", "yarn")), "rope_theta")
    bases = {base for base in listing(config, "layer_rope_theta", int, float) or [own] if base}
    if len(bases) > 1:
        raise ArchitectureError(
            f"layer_rope_theta of {class_name(config)} in config.json has {len(bases)} bases, but "
            "llama.cpp has one for all layers that are rotated"
        )
    return float(max(bases, default=own))


def _dims(config: Config) -> dict[str, int]:
    return mixture_dims(config, attention_dims(config))


def _mixture_dims(config: Config) -> dict[str, int]:
    return {**_dims(config), "experts": integer(config, "num_local_experts")}


def _rules(config: Config) -> tuple[Rule, ...]:
    return (*rules(config), _SINKS)


def _mixture_rules(config: Config) -> tuple[Rule, ...]:
    shared = _SHARED if config.get("shared_intermediate_size") else ()
    return (*around(config), _SINKS, *_EXPERTS, *shared)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    base = _base(config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    single = {**config, "rope_parameters": {**rope, "rope_theta": base}}
    listed = listing(config, "layer_rope_theta", int, float, length=dims["layers"])
    bases = [1] * dims["layers"] if listed is None else listed
    return {
        **keys(single, dims),
        **window_keys(config, _kinds(config, dims["layers"])),
        **mixture_keys(config, dims),
        _ROTATED: array("bool", [bool(base) for base in bases]),
    }


def _check(config: Config, dims: Dims) -> None:
    if "sliding_attention" not in _kinds(config, dims["layers"]):
        raise ArchitectureError(
            f"config.json of {class_name(config)} gives no layer a sliding window, which llama.cpp "
            "expects"
        )


def _config(header: Header) -> dict[str, Any]:
    mixture = bool(header.keys.get("expert_count"))
    model = ("GraniteSWAForCausalLM", "granite_swa")
    if mixture:
        model = ("GraniteMoeSWAForCausalLM", "granitemoe_swa")
    config = decoder_config(header, *model)
    base = config["rope_parameters"]["rope_theta"]
    rotated = header.keys.get(_ROTATED, [])
    return {
        **config,
        **window_config(header),
        **header.named(
            num_local_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            shared_intermediate_size=SHARED,
            **MULTIPLIERS,
        ),
        "layer_rope_theta": [base if each else 0 for each in rotated] or None,
    }


GRANITE_SWA = Architecture(
    name="granite_swa",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={**DEFAULTS, "tie_word_embeddings": True, "sliding_window": 128},
    fixed=FIXED,
    ignored=IGNORED,
    folds=Folds(),
)

GRANITE_MOE_SWA = replace(
    GRANITE_SWA,
    read_dims=_mixture_dims,
    read_rules=_mixture_rules,
    defaults={
        **DEFAULTS,
        "sliding_window": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    renames=tuple((rf"\.{re.escape(before)}$", f".{after}") for before, after in _NAMES.items()),
)
