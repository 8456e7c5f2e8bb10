"""K-EXAONE: DeepSeek V3's experts, and a sliding window in most layers; "exaone-moe".

Only the windowed layers are rotated. llama.cpp keeps the block for multi-token prediction, but
does not run it.

Refused: models without a sliding window, for which llama.cpp takes one for granted.
Sources: LG's model card, transformers' modeling_exaone_moe.py, llama.cpp's
src/models/exaone-moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    MLP,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    output,
)
from quantcli.archs.gemma2 import layer_pattern
from quantcli.archs.header import Header
from quantcli.archs.mixture import (
    FOLDS,
    SIGMOID,
    MixtureNames,
    mixture_config,
    mixture_dims,
    mixture_keys,
    mixture_rules,
)
from quantcli.archs.mtp import Mtp, behind
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, u32

_NAMES = MixtureNames(experts="num_experts", shared="num_shared_experts")
_KINDS = ("full_attention", "sliding_attention")


def _dims(config: Config) -> dict[str, int]:
    return {**attention_dims(config), **mixture_dims(config, _NAMES)}


def _windowed(config: Config, layers: int) -> list[bool]:
    """Which layers have a window."""
    kinds = config.get("layer_types")
    if kinds is None:
        pattern = config.get("sliding_window_pattern")
        if isinstance(pattern, str) and pattern:
            kinds = [_KINDS[pattern[i % len(pattern)] == "L"] for i in range(layers)]
        else:
            kinds = layer_pattern(layers, integer(config, "sliding_window_pattern"))
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(_KINDS):
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json is {kinds!r}, expected one of "
            f"{' and '.join(_KINDS)} for each of {layers} layers"
        )
    return [kind == "sliding_attention" for kind in kinds]


_LAYER = (*NORMS, *ATTENTION, *HEAD_NORMS)


def _rules(config: Config) -> tuple[Rule, ...]:
    mixture = mixture_rules(config, _NAMES, bias="e_score_correction_bias")
    return (EMBEDDING, OUTPUT_NORM, output(config), *_LAYER, *mixture)


def _block_rules(config: Config, blocks: range) -> tuple[Rule, ...]:
    """A layer with a dense MLP, and how the block begins and ends."""
    hidden = integer(config, "hidden_size")
    inside = (
        replace(rule, source=rule.source.replace("model.layers.{i}.", "mtp.layers.0."))
        for rule in (*_LAYER, *MLP)
    )
    return behind(
        blocks,
        Rule("blk.{i}.nextn.eh_proj.weight", "mtp.fc.weight", (hidden, 2 * hidden)),
        Rule("blk.{i}.nextn.enorm.weight", "mtp.pre_fc_norm_embedding.weight", (hidden,)),
        Rule("blk.{i}.nextn.hnorm.weight", "mtp.pre_fc_norm_hidden.weight", (hidden,)),
        Rule("blk.{i}.nextn.shared_head_norm.weight", "mtp.norm.weight", (hidden,)),
        *inside,
    )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(read_rope(config, ("default",))),
        **mixture_keys(config, dims, SIGMOID, _NAMES),
        "expert_shared_feed_forward_length": u32(dims["shared_ff"]),
        "attention.sliding_window": u32(integer(config, "sliding_window")),
        "attention.sliding_window_pattern": array("bool", _windowed(config, dims["layers"])),
    }


def _config(header: Header) -> dict[str, Any]:
    windowed = header.keys.get("attention.sliding_window_pattern", ())
    found = mixture_config(header, _NAMES)
    layers = int(header.keys.get("block_count", 1))
    dense = found.pop(_NAMES.dense, 0)
    return {
        **decoder_config(header, "ExaoneMoeForCausalLM", "exaone_moe"),
        **found,
        **header.named(sliding_window="attention.sliding_window"),
        "layer_types": [_KINDS[bool(window)] for window in windowed],
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
    }


EXAONE_MOE = Architecture(
    name="exaone-moe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1024,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window_pattern": 4,
    },
    mtp=Mtp("num_nextn_predict_layers", "mtp.fc.weight", _block_rules, most=1),
    fixed={"hidden_act": ("silu", "swish"), "scoring_func": ("sigmoid",)},
    renames=((r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.e_score_correction_bias"),),
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=FOLDS,
)
