"""Gemma 2: norms before and after attention and MLP, soft-capped logits; llama.cpp's "gemma2".

transformers multiplies by 1 + weight in its RMSNorm, ggml by the weight, so 1 is added. Every
other layer, from the first on, looks back through a sliding window only. The output matrix is
always the embeddings'; a stored lm_head is left out.

Refused, because llama.cpp takes them as given: another layer pattern, another attention scale
than it derives, absent soft caps. Sources: arXiv:2408.00118, llama.cpp's src/models/gemma2.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer, number
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    layer,
)
from quantcli.archs.fold import POST_NORMED
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.pieces import Add
from quantcli.types import MetaValue, f32, u32

FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False,),
}
LAYER_NORMS = (
    layer("attn_norm.weight", "input_layernorm.weight", "hidden"),
    layer("post_attention_norm.weight", "post_attention_layernorm.weight", "hidden"),
    layer("ffn_norm.weight", "pre_feedforward_layernorm.weight", "hidden"),
    layer("post_ffw_norm.weight", "post_feedforward_layernorm.weight", "hidden"),
)

_WINDOW_EVERY = 2
_LAYERS_OF_27B = 46


def shift_norms(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The same rules, with 1 added to the weights of every norm."""
    return tuple(
        replace(rule, pointwise=Add(1.0)) if rule.name.endswith("norm.weight") else rule
        for rule in rules
    )


def check_scale(config: Config, dims: Dims, layers_of_27b: int) -> None:
    """Refuse a ``query_pre_attn_scalar`` that llama.cpp does not derive from the sizes.

    It takes the size of a head, but hidden_size / heads in the 27B model, which it knows by its
    number of layers.
    """
    known = dims["head_dim"]
    if dims["layers"] == layers_of_27b:
        known = dims["hidden"] // dims["heads"]
    found = number(config, "query_pre_attn_scalar", default=known)
    if not math.isclose(found, known):
        raise ArchitectureError(
            f"config.json sets query_pre_attn_scalar to {found:g}, but llama.cpp computes this "
            f"{class_name(config)} with {known} only"
        )


def windowed_layers(config: Config, layers: int, every: int) -> list[str]:
    """The layers' types: given, or windowed except each ``every``-th."""
    found = config.get("layer_types")
    return list(found) if isinstance(found, list) else layer_pattern(layers, every)


def layer_pattern(layers: int, every: int) -> list[str]:
    """Windowed layers, with each ``every``-th looking at the whole context."""
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def refuse_pattern(config: Config, every: int) -> ArchitectureError:
    """The sentence for layers that are not in llama.cpp's order."""
    return ArchitectureError(
        f"layer_types of {class_name(config)} in config.json are not llama.cpp's pattern for it, "
        f"a sliding window in all layers but each {every}th"
    )


def _check(config: Config, dims: Dims) -> None:
    check_scale(config, dims, _LAYERS_OF_27B)
    usual = layer_pattern(dims["layers"], _WINDOW_EVERY)
    if windowed_layers(config, dims["layers"], _WINDOW_EVERY) != usual:
        raise refuse_pattern(config, _WINDOW_EVERY)
    if config.get("tie_word_embeddings") is False:
        raise ArchitectureError(
            "config.json sets tie_word_embeddings to false, but llama.cpp computes "
            f"{class_name(config)} with tied embeddings only"
        )


def _rules(config: Config) -> tuple[Rule, ...]:
    return shift_norms((EMBEDDING, OUTPUT_NORM, *LAYER_NORMS, *ATTENTION, *MLP))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(read_rope(config, ("default", "linear"))),
        "attention.sliding_window": u32(integer(config, "sliding_window")),
        "attn_logit_softcapping": f32(number(config, "attn_logit_softcapping")),
        "final_logit_softcapping": f32(number(config, "final_logit_softcapping")),
    }


def scale_config(config: Mapping[str, Any], layers_of_27b: int) -> dict[str, Any]:
    """The attention's scale, which llama.cpp derives as `check_scale` says."""
    scale = config.get("head_dim", 256)
    if config.get("num_hidden_layers") == layers_of_27b:
        scale = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": scale}


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "Gemma2ForCausalLM", "gemma2")
    return {
        **config,
        **scale_config(config, _LAYERS_OF_27B),
        **header.named(
            final_logit_softcapping="final_logit_softcapping",
            sliding_window="attention.sliding_window",
            attn_logit_softcapping="attn_logit_softcapping",
        ),
    }


GEMMA2 = Architecture(
    name="gemma2",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "head_dim": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed=FIXED,
    ignored=(r"lm_head\.weight", r".*\.rotary_emb\.inv_freq"),
    folds=POST_NORMED,
)
