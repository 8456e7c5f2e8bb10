"""MiniCPM 1, 2 and 4: Llama with three multipliers; llama.cpp's "minicpm".

Embeddings and residual branches are multiplied and logits divided, as Granite's are, by numbers
that config.json gives in the terms of its training: ``scale_emb``, ``scale_depth`` over the root of
the number of layers, and hidden_size over ``dim_model_base``. MiniCPM 4 has LongRoPE. The class
comes with the checkpoints alone.

Refused: experts (MiniCPM-MoE). MiniCPM 4.1's sparse attention is not a part of llama.cpp's
graph, which attends to everything (a note says so).
Sources: arXiv:2404.06395, the checkpoints' modeling_minicpm.py, llama.cpp's src/models/minicpm.cpp.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from quantcli.archs.config import Config, class_name, number, positive
from quantcli.archs.decoder import decoder_config, decoder_keys
from quantcli.archs.header import Header
from quantcli.archs.llama import LLAMA
from quantcli.archs.longrope import long_config, long_keys, long_values
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Values
from quantcli.types import MetaValue, f32, text, u32

_LONG = "longrope"


def _rope(config: Config) -> Rope:
    return read_rope(config, ("default", "linear", _LONG))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = _rope(config)
    long = rope["rope_type"] == _LONG
    keys = {
        **decoder_keys(config, dims),
        "rope.dimension_count": u32(dims["head_dim"]),
        **rope_keys(rope),
        "embedding_scale": f32(number(config, "scale_emb")),
        "residual_scale": f32(number(config, "scale_depth") / math.sqrt(dims["layers"])),
        "logit_scale": f32(dims["hidden"] / positive(config, "dim_model_base")),
    }
    if long:
        keys |= {"rope.scaling.type": text(_LONG), **long_keys(rope)}
    return keys


def _values(config: Config, dims: Dims) -> Values:
    rope = _rope(config)
    return long_values(rope, dims["head_dim"]) if rope["rope_type"] == _LONG else {}


def _notes(config: Config) -> tuple[str, ...]:
    if not config.get("sparse_config"):
        return ()
    return (
        f"{class_name(config)} attends to a part of long texts only (sparse_config); llama.cpp "
        "attends to everything",
    )


def _config(header: Header) -> dict[str, Any]:
    keys = header.keys
    config = decoder_config(header, "MiniCPMForCausalLM", "minicpm")
    config["rope_parameters"] |= long_config(header)
    layers, hidden = keys.get("block_count", 1), keys.get("embedding_length", 1)
    return {
        **config,
        "hidden_act": "silu",
        "scale_emb": keys.get("embedding_scale", 1.0),
        "scale_depth": keys.get("residual_scale", 1.0) * math.sqrt(layers),
        "dim_model_base": hidden / keys.get("logit_scale", 1.0),
    }


MINICPM = replace(
    LLAMA,
    name="minicpm",
    to_keys=_keys,
    to_config=_config,
    read_values=_values,
    read_notes=_notes,
    defaults={
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "scale_emb": 1,
        "scale_depth": 1.0,
        "dim_model_base": 1,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "num_experts": (0,),
    },
)
