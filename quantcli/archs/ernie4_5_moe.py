"""ERNIE 4.5 with experts, the text models: dense first layers, softmax router; "ernie4_5-moe".

A bias that is stored apart has its say in the choice of experts alone. Blocks for multi-token
prediction, of which llama.cpp has none for it, are left out.

Refused: layers without experts after one with, of which llama.cpp's tensors know nothing.
Sources: Baidu's ERNIE 4.5 report, transformers' modeling_ernie4_5_moe.py, llama.cpp's
src/models/ernie4-5.cpp and ernie4-5-moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
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
    SOFTMAX,
    MixtureNames,
    mixture_config,
    mixture_dims,
    mixture_keys,
    mixture_rules,
)
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_NAMES = MixtureNames(
    experts="moe_num_experts",
    used="moe_k",
    shared="moe_num_shared_experts",
    dense="moe_layer_start_index",
)
_BIAS = "moe_statics.e_score_correction_bias"


def _dims(config: Config) -> dict[str, int]:
    return {**attention_dims(config), **mixture_dims(config, _NAMES)}


def _check(config: Config, dims: Dims) -> None:
    last = config.get("moe_layer_end_index")
    if last is not None and last not in (-1, dims["layers"] - 1):
        raise ArchitectureError(
            f"config.json of {class_name(config)} sets moe_layer_end_index to {last!r}, but "
            f"llama.cpp takes experts in each layer up to the last, {dims['layers'] - 1}"
        )


def _rules(config: Config) -> tuple[Rule, ...]:
    mixture = (
        replace(rule, stored=(1, "experts")) if rule.name.endswith("exp_probs_b.bias") else rule
        for rule in mixture_rules(config, _NAMES, bias=_BIAS)
    )
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION, *mixture)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    keys = mixture_keys({**config, "norm_topk_prob": True}, dims, SOFTMAX, _NAMES)
    if dims["shared_ff"]:
        keys["expert_shared_feed_forward_length"] = u32(dims["shared_ff"])
    return {
        **decoder_keys(config, dims),
        **rope_keys(read_rope(config, ("default",))),
        **keys,
        "interleave_moe_layer_step": u32(1),
    }


def _config(header: Header) -> dict[str, Any]:
    found = mixture_config(header, _NAMES)
    unused = ("n_group", "topk_group", "norm_topk_prob", _NAMES.scale)
    return {
        **decoder_config(header, "Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
        **{key: value for key, value in found.items() if key not in unused},
    }


ERNIE4_5_MOE = Architecture(
    name="ernie4_5-moe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "use_bias": (False,),
        "moe_layer_interval": (1,),
        "moe_use_aux_free": (True,),
    },
    renames=((r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics."),),
    ignored=(r".*\.rotary_emb\.inv_freq", r"model\.mtp_.*"),
    folds=FOLDS,
)
