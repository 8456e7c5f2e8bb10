"""Gemma 3n, the text model: four streams (AltUp), a low-rank residual (Laurel), per-layer inputs.

llama.cpp has most of the sizes in its code: four streams of which the first is active, 64 for
Laurel, 256 for a layer's own embeddings, sparse activations in the first ten layers (at 0.95),
keys and values of their own in the first twenty, a soft cap of 30. Models of other numbers are
refused. Later layers read the keys and values of the last windowed or full one before; llama.cpp
asks for matrices of theirs all the same and never uses them, so they get those that they read,
which a checkpoint need not hold for them. It takes the deviation of a gate over one value less than
there are, 3e-5 of it in the published sizes.

Per-layer embeddings cover fewer tokens than there are; the others have the first row, as in
transformers.
Sources: arXiv:2301.13310 (AltUp), arXiv:2411.07501 (Laurel), transformers' modeling_gemma3n.py,
llama.cpp's src/models/gemma3n.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer, listing, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    MLP,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    layer,
    output,
)
from quantcli.archs.fold import Folds
from quantcli.archs.gemma2 import LAYER_NORMS
from quantcli.archs.gemma4 import PER_LAYER
from quantcli.archs.header import Header
from quantcli.archs.rope import read_layer_rope, rope_keys
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, f32, u32

_FULL, _WINDOWED = "full_attention", "sliding_attention"
_WINDOW_EVERY = 5
_OWNERS, _SPARSE, _SPARSITY = 20, 10, 0.95
_STD = float(np.float32(1.6448533535003662))
"""How many deviations above the mean a value of the largest 5 % lies; llama.cpp's own number."""

_STREAMS = tuple(
    Rule(f"{name}.weight", f"model.{source}.{{e}}.weight", ("others", "hidden", "hidden"))
    for name, source in (
        ("altup_proj", "altup_projections"), ("altup_unembd_proj", "altup_unembed_projections"),
    )
)  # fmt: skip
_ALTUP = (
    layer("altup_correct_coef.weight", "altup.correction_coefs.weight", "streams", "streams"),
    layer("altup_correct_scale.weight", "altup.correct_output_scale", "hidden"),
    layer("altup_predict_coef.weight", "altup.prediction_coefs.weight", "pairs", "streams"),
    layer("altup_router.weight", "altup.modality_router.weight", "streams", "hidden"),
    layer("altup_router_norm.weight", "altup.router_norm.weight", "hidden"),
    layer("laurel_l.weight", "laurel.linear_left.weight", "rank", "hidden"),
    layer("laurel_r.weight", "laurel.linear_right.weight", "hidden", "rank"),
    layer("laurel_post_norm.weight", "laurel.post_laurel_norm.weight", "hidden"),
)


def _kinds(config: Config, layers: int) -> list[str]:
    usual = [_WINDOWED if (i + 1) % _WINDOW_EVERY else _FULL for i in range(layers)]
    return listing(config, "layer_types", str) or usual


def _dims(config: Config) -> dict[str, int]:
    if isinstance(config.get("intermediate_size"), list):
        widths = listing(config, "intermediate_size", int) or []
        if len(set(widths)) != 1:
            raise ArchitectureError(
                f"intermediate_size of {class_name(config)} in config.json is {widths!r}, but "
                "llama.cpp has one for all layers"
            )
        config = {**config, "intermediate_size": widths[0]}
    dims = attention_dims(config)
    streams = integer(config, "altup_num_inputs")
    per_layer = integer(config, "hidden_size_per_layer_input")
    return {
        **dims,
        "streams": streams,
        "others": streams - 1,
        "pairs": streams * streams,
        "rank": integer(config, "laurel_rank"),
        "per_layer": per_layer,
        "per_layer_all": per_layer * dims["layers"],
        "per_layer_vocab": integer(config, "vocab_size_per_layer_input"),
    }


def _check(config: Config, dims: Dims) -> None:
    layers = dims["layers"]
    shared = config.get("num_kv_shared_layers") or 0
    if shared != max(layers - _OWNERS, 0):
        raise ArchitectureError(
            f"config.json sets num_kv_shared_layers to {shared!r} of {layers}, but llama.cpp gives "
            f"keys and values of their own to the first {_OWNERS} layers of {class_name(config)}"
        )
    kinds = _kinds(config, layers)
    if (
        len(kinds) != layers or not set(kinds) <= {_FULL, _WINDOWED} or _WINDOWED not in kinds
        or (shared and kinds[_OWNERS - 2 : _OWNERS] != [_WINDOWED, _FULL])
    ):  # fmt: skip
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json is {kinds!r}, but llama.cpp needs "
            f"one for each of {layers} layers, {_WINDOWED} among them, and lets shared layers read "
            f"the two before them, which have to be {_WINDOWED} and {_FULL}"
        )
    usual = _sparsity(layers)
    found = listing(config, "activation_sparsity_pattern", int, float)
    if found is None:
        found = usual if layers > _SPARSE else [0.0] * layers
    if found != usual:
        raise ArchitectureError(
            f"activation_sparsity_pattern of {class_name(config)} in config.json is {found!r}, but "
            f"llama.cpp computes it with {_SPARSITY} in the first {_SPARSE} layers only"
        )
    if dims["per_layer_vocab"] > dims["vocab"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has vocab_size_per_layer_input "
            f"{dims['per_layer_vocab']}, more than vocab_size {dims['vocab']}"
        )


def _sparsity(layers: int) -> list[float]:
    return [_SPARSITY if index < _SPARSE else 0.0 for index in range(layers)]


def _rules(config: Config) -> tuple[Rule, ...]:
    layers = integer(config, "num_hidden_layers")
    owners, kinds = range(min(layers, _OWNERS)), _kinds(config, layers)
    query, key, value, out = ATTENTION
    query_norm, key_norm = HEAD_NORMS
    own = tuple(replace(rule, layers=owners) for rule in (key, value, key_norm))
    read = tuple(
        replace(
            rule,
            name=rule.name.replace("{i}", str(index)),
            source=rule.source.replace("{i}", str(_OWNERS - 1 - (kinds[index] == _WINDOWED))),
        )
        for index in range(_OWNERS, layers)
        for rule in own
    )
    table, *per_layer = PER_LAYER
    return (
        EMBEDDING, OUTPUT_NORM, output(config), *LAYER_NORMS, *MLP, *_STREAMS, *_ALTUP,
        query, query_norm, out, *own, *read, _padded(config, table), *per_layer,
    )  # fmt: skip


def _padded(config: Config, table: Rule) -> Rule:
    """The table with its first row again for each token behind its last one."""
    more = integer(config, "vocab_size") - integer(config, "vocab_size_per_layer_input")
    if more <= 0:
        return table
    view = ("per_layer_vocab", "per_layer_all")
    first = Part(view, cut=((0, 0, 1),))
    return replace(table, stored=view, parts=(Part(view), *(first for _ in range(more))))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    full = read_layer_rope(config, _FULL, "rope_theta", ("default", "linear"))
    local = read_layer_rope(config, _WINDOWED, "rope_local_base_freq", ("default",))
    layers = dims["layers"]
    return {
        **decoder_keys(config, dims),
        **rope_keys(full),
        "rope.freq_base_swa": f32(positive(local, "rope_theta")),
        "activation_sparsity_scale": array(
            "f32", [_STD if share else -np.inf for share in _sparsity(layers)]
        ),
        "altup.active_idx": u32(0),
        "altup.num_inputs": u32(dims["streams"]),
        "attention.shared_kv_layers": u32(max(layers - _OWNERS, 0)),
        "attention.sliding_window": u32(integer(config, "sliding_window")),
        "attention.sliding_window_pattern": array(
            "bool", [kind == _WINDOWED for kind in _kinds(config, layers)]
        ),
        "embedding_length_per_layer_input": u32(dims["per_layer"]),
        "final_logit_softcapping": f32(positive(config, "final_logit_softcapping")),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "Gemma3nForCausalLM", "gemma3n_text")
    layers = int(config.get("num_hidden_layers", 1))
    return {
        **config,
        **header.named(
            sliding_window="attention.sliding_window",
            num_kv_shared_layers="attention.shared_kv_layers",
            hidden_size_per_layer_input="embedding_length_per_layer_input",
        ),
        "vocab_size_per_layer_input": header.shapes["token_embd.weight"][0],
        "activation_sparsity_pattern": _sparsity(layers),
        "layer_types": [
            _WINDOWED if windowed else _FULL
            for windowed in header.keys.get("attention.sliding_window_pattern", [])
        ],
        "rope_parameters": {
            _FULL: config["rope_parameters"],
            _WINDOWED: {
                "rope_type": "default",
                "rope_theta": header.keys.get("rope.freq_base_swa", 10000.0),
            },
        },
    }


GEMMA3N = Architecture(
    name="gemma3n",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "vocab_size": 262400,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "altup_num_inputs": 4,
        "laurel_rank": 64,
        "num_kv_shared_layers": 15,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "altup_num_inputs": (4,),
        "altup_active_idx": (0,),
        "altup_correct_scale": (True,),
        "laurel_rank": (64,),
        "hidden_size_per_layer_input": (256,),
        "final_logit_softcapping": (30.0,),
    },
    ignored=(
        r".*\.rotary_emb(_local)?\.\w*inv_freq",
        r"model\.layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm)\.weight",
    ),
    folds=Folds(),
)
