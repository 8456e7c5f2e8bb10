"""Bamba: Mamba-2 with attention in some layers, before Granite 4; llama.cpp's "granitehybrid".

It is a Granite 4 without experts and multipliers. Half of each head is rotated; rows of q and k are
interleaved in both halves, which leaves the products of the other one alone.

Refused: what is refused of Granite 4.
Sources: IBM's model cards, transformers' modeling_bamba.py, llama.cpp's
src/models/granite-hybrid.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer, number
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    attention_dims,
    decoder_keys,
    layer,
    output,
)
from quantcli.archs.fold import HYBRID
from quantcli.archs.granite_config import ROTATES, rebuilt
from quantcli.archs.mamba_mixer import MAMBA2, STEP_LIMITS, mamba2, mamba2_dims, mamba2_keys
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, boolean, u32

_NORMS = (
    layer("attn_norm.weight", "input_layernorm.weight", "hidden"),
    layer("ffn_norm.weight", "pre_ff_layernorm.weight", "hidden"),
)
_HALVES = {"attn_q": "q_halves", "attn_k": "kv_halves"}
_ATTENTION = tuple(replace(rule, rotary=_HALVES.get(rule.name.split(".")[2])) for rule in ATTENTION)
_MLP = tuple(replace(rule, source=rule.source.replace(".mlp.", ".feed_forward.")) for rule in MLP)


def _attention_layers(config: Config) -> tuple[int, ...]:
    found = config.get("attn_layer_indices") or []
    layers = integer(config, "num_hidden_layers")
    if not isinstance(found, list) or not all(index in range(layers) for index in found):
        raise ArchitectureError(
            f"attn_layer_indices of {class_name(config)} in config.json is {found!r}, expected "
            f"some of {layers} layers"
        )
    return tuple(found)


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    if dims["head_dim"] % 4:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has heads of {dims['head_dim']}, of which half "
            "cannot be rotated"
        )
    return {
        **dims,
        **mamba2_dims(config, dims["hidden"], 2 * dims["hidden"]),
        "q_halves": 2 * dims["heads"],
        "kv_halves": 2 * dims["kv_heads"],
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    attention = _attention_layers(config)
    mixers = sorted(set(range(integer(config, "num_hidden_layers"))) - set(attention))
    return (
        EMBEDDING,
        Rule("output_norm.weight", "model.final_layernorm.weight", ("hidden",)),
        output(config),
        *_NORMS,
        *(replace(rule, layers=attention) for rule in _ATTENTION),
        *mamba2("model.layers.{i}.mamba", mixers),
        *_MLP,
    )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    attention = _attention_layers(config)
    heads = [dims["kv_heads"] if index in attention else 0 for index in range(dims["layers"])]
    rope = read_rope(config, ("default",), partial=True)
    share = number(rope, "partial_rotary_factor", default=0.5)
    if share != 0.5:
        raise ArchitectureError(
            f"config.json sets partial_rotary_factor to {share:g}, but {class_name(config)} "
            "rotates half of a head"
        )
    return {
        **decoder_keys(config, dims),
        **rope_keys(rope),
        **mamba2_keys(dims),
        ROTATES: boolean(True),
        "rope.dimension_count": u32(dims["head_dim"] // 2),
        "attention.head_count_kv": array("i32", heads),
    }


BAMBA = Architecture(
    name="granitehybrid",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=rebuilt,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        **dict(zip(MAMBA2, (4, 256, 128, 1), strict=True)),
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "mamba_expand": (2,),
        "mamba_conv_bias": (True,),
        "mamba_proj_bias": (False,),
        "time_step_limit": STEP_LIMITS,
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=HYBRID,
)
