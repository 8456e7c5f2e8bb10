"""Gemma 3, the text model: Gemma 2 with normed heads and two rotations; llama.cpp's "gemma3".

Five of six layers look through a sliding window and rotate with their own base; the sixth looks
at the whole context. Of the image-and-text class only the text model is taken: the vision tower
and its projector are left out, and ``text_config`` is read, which publishers leave mostly empty,
so transformers' defaults stand here in full.

EmbeddingGemma is the same reading in both directions, with half the window on either side of a
token; llama.cpp's "gemma-embedding".

Refused: another layer pattern (except full attention everywhere), another attention scale,
capped attention logits, a scaled rotation in windowed layers.
Sources: arXiv:2503.19786, arXiv:2509.20354, llama.cpp's src/models/gemma3.cpp and
gemma-embedding.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, check_fixed, flag, integer, number
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    MLP,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    output,
)
from quantcli.archs.fold import POST_NORMED
from quantcli.archs.gemma2 import (
    FIXED,
    LAYER_NORMS,
    check_scale,
    layer_pattern,
    refuse_pattern,
    scale_config,
    shift_norms,
    windowed_layers,
)
from quantcli.archs.header import Header
from quantcli.archs.rope import read_layer_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, boolean, f32, u32

_WINDOW_EVERY = 6
_LAYERS_OF_27B = 62


def _layer_types(config: Config, dims: Dims) -> list[str]:
    every = integer(
        config, "sliding_window_pattern", "_sliding_window_pattern", default=_WINDOW_EVERY
    )
    return windowed_layers(config, dims["layers"], every)


def _check(config: Config, dims: Dims) -> None:
    check_scale(config, dims, _LAYERS_OF_27B)
    types = _layer_types(config, dims)
    if types != layer_pattern(dims["layers"], _WINDOW_EVERY) and "sliding_attention" in types:
        raise refuse_pattern(config, _WINDOW_EVERY)


def _rules(config: Config) -> tuple[Rule, ...]:
    return shift_norms(
        (EMBEDDING, OUTPUT_NORM, output(config), *LAYER_NORMS, *ATTENTION, *HEAD_NORMS, *MLP)
    )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    full = read_layer_rope(config, "full_attention", "rope_theta", ("default", "linear"))
    keys = {**decoder_keys(config, dims), **rope_keys(full)}
    if "sliding_attention" in _layer_types(config, dims):
        local = read_layer_rope(config, "sliding_attention", "rope_local_base_freq", ("default",))
        keys["rope.freq_base_swa"] = f32(number(local, "rope_theta"))
        keys["attention.sliding_window"] = u32(integer(config, "sliding_window"))
    if config.get("final_logit_softcapping") is not None:
        keys["final_logit_softcapping"] = f32(number(config, "final_logit_softcapping"))
    return keys


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "Gemma3ForCausalLM", "gemma3_text")
    layers = int(config.get("num_hidden_layers", 1))
    windowed = "attention.sliding_window" in header.keys
    return {
        **config,
        **scale_config(config, _LAYERS_OF_27B),
        **header.named(
            final_logit_softcapping="final_logit_softcapping",
            sliding_window="attention.sliding_window",
        ),
        "layer_types": layer_pattern(layers, _WINDOW_EVERY)
        if windowed
        else ["full_attention"] * layers,
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": header.keys.get("rope.freq_base_swa", 10000.0),
            },
        },
    }


def _check_embedder(config: Config, dims: Dims) -> None:
    _check(config, dims)
    if "sliding_attention" not in _layer_types(config, dims):
        raise refuse_pattern(config, _WINDOW_EVERY)
    check_fixed(config, {"query_pre_attn_scalar": (dims["head_dim"],)})


def _embedder_config(header: Header) -> dict[str, Any]:
    return {
        **_config(header),
        "architectures": ["Gemma3TextModel"],
        "use_bidirectional_attention": True,
    }


_GEMMA3 = Architecture(
    name="gemma3",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
    },
    fixed={**FIXED, "attn_logit_softcapping": ()},
    ignored=(r".*\.rotary_emb(_local)?\.inv_freq",),
    folds=POST_NORMED,
)
EMBEDDER = replace(
    _GEMMA3,
    name="gemma-embedding",
    to_keys=lambda config, dims: {**_keys(config, dims), "attention.causal": boolean(False)},
    to_config=_embedder_config,
    check=_check_embedder,
    fixed={key: value for key, value in _GEMMA3.fixed.items() if "bidirectional" not in key},
    published=((r"^model\.", ""),),
    folds=replace(POST_NORMED, apart=("dense_2", "dense_3")),
    tied=True,
)
GEMMA3 = replace(
    _GEMMA3, others=((lambda config: flag(config, "use_bidirectional_attention"), EMBEDDER),)
)
