"""Phi-3 and Phi-4-mini: q, k, v fused and gate above up, as llama.cpp's "phi3" keeps them.

LongRoPE's two lists of divisors become tensors, of which llama.cpp takes the long one for
contexts beyond the original length, and its attention factor a key. A part of each head may be
left unrotated. llama.cpp reads the sliding window but does not apply it (a note says so).

Refused: "yarn", which transformers reads as LongRoPE here and llama.cpp's converter does not.
Sources: arXiv:2404.14219, LongRoPE (arXiv:2402.13753), llama.cpp's src/models/phi3.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, integer, positive
from quantcli.archs.decoder import (
    EMBEDDING,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    layer,
    output,
    partial_config,
    partial_rotation,
    unwindowed_note,
)
from quantcli.archs.fold import FUSED
from quantcli.archs.header import Header
from quantcli.archs.longrope import long_config, long_keys, long_values
from quantcli.archs.rope import Rope, read_rope
from quantcli.archs.rules import Dims, Rule, Values
from quantcli.types import MetaValue, f32, u32

_LONG = ("longrope", "su")
_ATTENTION = (
    layer("attn_qkv.weight", "self_attn.qkv_proj.weight", "qkv", "hidden"),
    layer("attn_output.weight", "self_attn.o_proj.weight", "hidden", "hidden"),
)
_MLP = (
    layer("ffn_up.weight", "mlp.gate_up_proj.weight", "gate_up", "hidden"),
    layer("ffn_down.weight", "mlp.down_proj.weight", "hidden", "ff"),
)


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    return {**dims, "qkv": dims["q"] + 2 * dims["kv"], "gate_up": 2 * dims["ff"]}


def _rope(config: Config) -> Rope:
    return read_rope(config, ("default", *_LONG), partial=True)


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *_ATTENTION, *_MLP)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = _rope(config)
    original = integer(rope, "original_max_position_embeddings", "max_position_embeddings")
    window = config.get("sliding_window")
    keys = {
        **decoder_keys(config, dims),
        "rope.dimension_count": u32(partial_rotation(_rope(config), dims)),
        "rope.freq_base": f32(positive(rope, "rope_theta")),
        "rope.scaling.original_context_length": u32(original),
        # llama.cpp tells Phi-4 (no window) from Phi-3 by a zero here.
        "attention.sliding_window": u32(0 if window is None else integer(config, "sliding_window")),
    }
    if rope["rope_type"] in _LONG:
        keys |= long_keys(rope)
    return keys


def _values(config: Config, dims: Dims) -> Values:
    rope = _rope(config)
    return long_values(rope, partial_rotation(rope, dims)) if rope["rope_type"] in _LONG else {}


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "Phi3ForCausalLM", "phi3")
    keys = header.keys
    rope = partial_config(config, header) | {"rope_type": "default"}
    original = keys.get("rope.scaling.original_context_length", keys.get("context_length"))
    rope |= long_config(header)
    return {
        **config,
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


PHI3 = Architecture(
    name="phi3",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    read_values=_values,
    read_notes=unwindowed_note,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
    },
    fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,)},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=FUSED,
)
