"""Ministral 3, Devstral 2 and what else has Mistral's text model of late 2025: "mistral3".

Llama with YaRN, whose limits and scale llama.cpp reads here, and with attention that is sharpened
by the logarithm of the position beyond the original context (``llama_4_scaling_beta``). As in
Llama, ggml rotates neighbouring pairs, so the rows of q and k are interleaved.

A sliding window is not part of llama.cpp's graph (a note says so). Sources: Mistral's model cards,
transformers' modeling_ministral3.py, llama.cpp's src/models/mistral3.cpp.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from quantcli.archs.config import Config, number
from quantcli.archs.decoder import decoder_config, decoder_keys
from quantcli.archs.header import Header
from quantcli.archs.llama import LLAMA
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Values
from quantcli.types import MetaValue, f32, u32

_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
_TEMPERATURE = "attention.temperature_scale"


def _no_values(config: Config, dims: Dims) -> Values:
    return {}


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = read_rope(config, ("default", "yarn"))
    keys = {
        **decoder_keys(config, dims),
        "rope.dimension_count": u32(dims["head_dim"]),
        **_rope_keys(rope),
    }
    beta = number(rope, "llama_4_scaling_beta", default=0.0)
    if beta and rope["rope_type"] == "yarn":
        keys[_TEMPERATURE] = f32(beta)
    return keys


def _rope_keys(rope: Rope) -> dict[str, MetaValue]:
    """llama.cpp divides YaRN's scale by that of mscale_all_dim, and takes mscale for 1."""
    over, under = (number(rope, key, default=0.0) for key in ("mscale", "mscale_all_dim"))
    if rope["rope_type"] != "yarn" or rope.get("attention_factor") is not None:
        return rope_keys(rope, betas=True)
    if not under or not math.isclose(over, 1):
        return rope_keys(rope, betas=True)
    keys = rope_keys({**rope, "mscale": None}, betas=True)
    return {**keys, _LOG_MULTIPLIER: f32(under)}


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "Ministral3ForCausalLM", "ministral3")
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        rope["llama_4_scaling_beta"] = header.keys.get(_TEMPERATURE, 0.0)
        if header.keys.get(_LOG_MULTIPLIER):
            rope |= {"mscale": 1.0, "mscale_all_dim": header.keys[_LOG_MULTIPLIER]}
    return config


MINISTRAL3 = replace(
    LLAMA,
    name="mistral3",
    to_keys=_keys,
    to_config=_config,
    read_values=_no_values,
    defaults={"tie_word_embeddings": False, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    },
)
