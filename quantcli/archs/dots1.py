"""dots.llm1: multi-head attention with normed heads and DeepSeek V3's experts; "dots1".

Refused: sliding windows and fewer key-value heads, of which llama.cpp has neither for it.
Sources: arXiv:2506.05767, transformers' modeling_dots1.py, llama.cpp's src/models/dots1.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
)
from quantcli.archs.header import Header
from quantcli.archs.mixture import (
    FOLDS,
    SIGMOID,
    mixture_config,
    mixture_dims,
    mixture_keys,
    mixture_rules,
)
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue


def _dims(config: Config) -> dict[str, int]:
    return {**attention_dims(config), **mixture_dims(config)}


def _check(config: Config, dims: Dims) -> None:
    types = config.get("layer_types")
    late = integer(config, "max_window_layers", default=dims["layers"]) < dims["layers"]
    windowed = "sliding_attention" in types if isinstance(types, list) else late
    if windowed and config.get("sliding_window") is not None:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has layers with a sliding window, but llama.cpp "
            "lets each attend to the whole context"
        )
    if dims["kv_heads"] != dims["heads"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {dims['kv_heads']} key-value heads for "
            f"{dims['heads']}, but llama.cpp takes as many as heads"
        )


def _rules(config: Config) -> tuple[Rule, ...]:
    inside = (*NORMS, *ATTENTION, *HEAD_NORMS, *mixture_rules(config))
    return (EMBEDDING, OUTPUT_NORM, OUTPUT, *inside)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(read_rope(config, ("default", "yarn"))),
        **mixture_keys(config, dims, SIGMOID),
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        **decoder_config(header, "Dots1ForCausalLM", "dots1"),
        **mixture_config(header),
        "sliding_window": None,
    }


DOTS1 = Architecture(
    name="dots1",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "sliding_window": 4096,
        "max_window_layers": 62,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "scoring_func": ("sigmoid", "noaux_tc"),
        "tie_word_embeddings": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=FOLDS,
)
