"""EXAONE 4: norms after attention and MLP only, and on each head of q and k; "exaone4".

The 32B model attends through a sliding window in three of four layers, and rotates only there; in
the small one every layer attends to the whole context and is rotated. Llama 3.1's frequency scaling
becomes the tensor rope_freqs.weight.
Sources: arXiv:2507.11407, transformers' modeling_exaone4.py, llama.cpp's src/models/exaone4.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    MLP,
    OUTPUT_NORM,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
    output,
)
from quantcli.archs.gemma2 import layer_pattern
from quantcli.archs.header import Header
from quantcli.archs.olmo2 import FOLDS
from quantcli.archs.rope import llama3_factors, llama3_rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule, Values
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, u32

_EVERY = 4
_HYBRID_LAYERS = 64
_NORMS = (
    layer("post_attention_norm.weight", "post_attention_layernorm.weight", "hidden"),
    layer("post_ffw_norm.weight", "post_feedforward_layernorm.weight", "hidden"),
)
_ROPE_TYPES = ("default", "llama3")


def _windowed(config: Config, layers: int) -> list[bool]:
    """Which layers have a window; empty where none has."""
    if config.get("sliding_window") is None:
        return []
    types = config.get("layer_types")
    found = list(types) if isinstance(types, list) else layer_pattern(layers, _EVERY)
    return [kind == "sliding_attention" for kind in found]


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *ATTENTION, *HEAD_NORMS, *_NORMS, *MLP)


def _check(config: Config, dims: Dims) -> None:
    check_square(config, dims)
    windowed = any(_windowed(config, dims["layers"]))
    if windowed != (dims["layers"] == _HYBRID_LAYERS):
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {dims['layers']} layers "
            f"{'with' if windowed else 'without'} a sliding window; llama.cpp applies one to "
            f"models of {_HYBRID_LAYERS} layers and to no others"
        )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    keys = {**decoder_keys(config, dims), **rope_keys(read_rope(config, _ROPE_TYPES))}
    windowed = _windowed(config, dims["layers"])
    if windowed:
        keys["attention.sliding_window"] = u32(integer(config, "sliding_window"))
        keys["attention.sliding_window_pattern"] = array("bool", windowed)
    return keys


def _values(config: Config, dims: Dims) -> Values:
    rope = read_rope(config, _ROPE_TYPES)
    if rope["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(rope, dims["head_dim"])}


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "Exaone4ForCausalLM", "exaone4")
    if "rope_freqs.weight" in header.shapes:
        divisors = header.read("rope_freqs.weight").reshape(-1).astype(np.float64)
        config["rope_parameters"] = llama3_rope(divisors, config["rope_parameters"]["rope_theta"])
    pattern = header.keys.get("attention.sliding_window_pattern", [])
    layers = int(config.get("num_hidden_layers", 1))
    return {
        **config,
        "sliding_window": header.keys.get("attention.sliding_window"),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in pattern]
        or ["full_attention"] * layers,
    }


EXAONE4 = Architecture(
    name="exaone4",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    read_values=_values,
    check=_check,
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    fixed={"hidden_act": ("silu", "swish")},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=FOLDS,
)
