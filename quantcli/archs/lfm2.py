"""LFM2 and LFM2.5: short convolutions, with attention in some layers; llama.cpp's "lfm2".

A layer without attention has 0 key-value heads in GGUF's list of them. The final norm is called
the embeddings', here and in llama.cpp. Older config.json files say ``full_attn_idxs`` in place of
``layer_types``, ``block_ff_dim`` for ``intermediate_size``, of which two thirds are taken, rounded
up, unless ``block_auto_adjust_ff_dim`` is false.

Refused: biases on the convolutions, which llama.cpp does not have.
Sources: Liquid AI's model cards, transformers' modeling_lfm2.py, llama.cpp's src/models/lfm2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, flag, integer, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
    output,
)
from quantcli.archs.fold import (
    GATED,
    GATED_EXPERTS,
    NORMED_MLP,
    VALUES,
    WRITERS,
    FoldRule,
    Folds,
)
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, u32

_KINDS = ("full_attention", "conv")
OUTPUT_NORM = Rule("token_embd_norm.weight", "model.embedding_norm.weight", ("hidden",))
NORMS = (
    layer("attn_norm.weight", "operator_norm.weight", "hidden"),
    layer("ffn_norm.weight", "ffn_norm.weight", "hidden"),
)
_ATTENTION = (
    *ATTENTION[:3],
    replace(ATTENTION[3], source="model.layers.{i}.self_attn.out_proj.weight"),
    layer("attn_q_norm.weight", "self_attn.q_layernorm.weight", "head_dim"),
    layer("attn_k_norm.weight", "self_attn.k_layernorm.weight", "head_dim"),
)
_CONVOLUTION = (
    replace(
        layer("shortconv.conv.weight", "conv.conv.weight", "hidden", "kernel"),
        stored=("hidden", 1, "kernel"),
    ),
    layer("shortconv.in_proj.weight", "conv.in_proj.weight", "conv_in", "hidden"),
    layer("shortconv.out_proj.weight", "conv.out_proj.weight", "hidden", "hidden"),
)
FEED_FORWARD = tuple(
    replace(rule, source=f"model.layers.{{i}}.feed_forward.{name}.weight")
    for rule, name in zip(MLP, ("w1", "w3", "w2"), strict=True)
)
FOLDS = Folds(
    rules=(
        FoldRule(
            "norm",
            ("blk.{i}.attn_norm",),
            ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v", "blk.{i}.shortconv.in_proj"),
        ),
        NORMED_MLP,
        VALUES,
        GATED,
        GATED_EXPERTS,
        FoldRule("norm", ("token_embd_norm",), ("output",)),
    ),
    writers=(*WRITERS, "blk.{i}.shortconv.out_proj"),
    basis="",
    apart=("blk.{i}.shortconv.conv", "blk.{i}.shortconv.out_proj"),
)


def _kinds(config: Config, layers: int) -> list[str]:
    """What each layer has, attention or a convolution."""
    found = config.get("layer_types")
    if found is None:
        chosen = config.get("full_attn_idxs")
        if not isinstance(chosen, list):
            chosen = range(layers)
        found = [_KINDS[0] if index in chosen else _KINDS[1] for index in range(layers)]
    if (
        not isinstance(found, list)
        or len(found) != layers
        or any(kind not in _KINDS for kind in found)
    ):
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json is {found!r}, expected one of "
            f"{' and '.join(_KINDS)} for each of {layers} layers"
        )
    return found


def _layers(config: Config, kind: str) -> tuple[int, ...]:
    kinds = _kinds(config, integer(config, "num_hidden_layers"))
    return tuple(index for index, found in enumerate(kinds) if found == kind)


def _dims(config: Config) -> dict[str, int]:
    ff = integer(config, "block_ff_dim", "intermediate_size")
    if flag(config, "block_auto_adjust_ff_dim", True):
        unit = integer(config, "block_multiple_of")
        scale = positive(config, "block_ffn_dim_multiplier", default=1.0)
        ff = -(-int(scale * int(2 * ff / 3)) // unit) * unit
    return mixer_dims({**config, "intermediate_size": ff})


def rules(config: Config, *feed_forward: Rule) -> tuple[Rule, ...]:
    """The whole table around the layers' ``feed_forward``."""
    attention, convolution = (_layers(config, kind) for kind in _KINDS)
    tied = config.get("tie_embedding", config["tie_word_embeddings"])
    head = output({**config, "tie_word_embeddings": tied})
    return (
        EMBEDDING, OUTPUT_NORM, head, *NORMS, *feed_forward,
        *(replace(rule, layers=attention) for rule in _ATTENTION),
        *(replace(rule, layers=convolution) for rule in _CONVOLUTION),
    )  # fmt: skip


def _rules(config: Config) -> tuple[Rule, ...]:
    return rules(config, *FEED_FORWARD)


def mixer_dims(config: Config) -> dict[str, int]:
    """Sizes of the convolutions beside attention's."""
    dims = attention_dims(config)
    return {**dims, "kernel": integer(config, "conv_L_cache"), "conv_in": 3 * dims["hidden"]}


def keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """The key-values of every LFM2; a layer's convolution shows in its key-value heads."""
    kinds = _kinds(config, dims["layers"])
    return {
        **decoder_keys({**config, "rms_norm_eps": config.get("norm_eps")}, dims),
        **rope_keys(read_rope(config, ("default",))),
        "attention.head_count_kv": array(
            "i32", [dims["kv_heads"] if kind == "full_attention" else 0 for kind in kinds]
        ),
        "shortconv.l_cache": u32(dims["kernel"]),
    }


def rebuilt(header: Header, model: str, model_type: str) -> dict[str, Any]:
    """`keys` read backwards, for the class ``model``."""
    config = decoder_config(header, model, model_type)
    heads = [int(count) for count in header.keys.get("attention.head_count_kv", ())]
    return {
        **config,
        "num_key_value_heads": max(heads, default=0),
        "norm_eps": config.pop("rms_norm_eps"),
        "layer_types": [_KINDS[0] if count else _KINDS[1] for count in heads],
        **header.named(conv_L_cache="shortconv.l_cache"),
    }


def _config(header: Header) -> dict[str, Any]:
    return {**rebuilt(header, "Lfm2ForCausalLM", "lfm2"), "block_auto_adjust_ff_dim": False}


DEFAULTS = {
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
}
FIXED = {"conv_bias": (False,)}


LFM2 = Architecture(
    name="lfm2",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=keys,
    to_config=_config,
    check=check_square,
    defaults={**DEFAULTS, "block_multiple_of": 256},
    fixed=FIXED,
    folds=FOLDS,
)
