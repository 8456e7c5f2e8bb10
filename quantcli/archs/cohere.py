"""Command-R and Command-R7B: attention and MLP side by side behind one LayerNorm.

llama.cpp's "command-r" and "cohere2". Neighbouring values are rotated in transformers too, so no
row moves. Logits are multiplied by a key-value, the output matrix is always the embeddings'. Of
Command-R7B only the layers with a sliding window are rotated.

Refused: biases; norms on q and k in models below 64 layers, where llama.cpp expects none.
Sources: Cohere's model cards, transformers' modeling_cohere.py and modeling_cohere2.py, llama.cpp's
src/models/command-r.cpp and cohere2.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, flag, integer, number
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    EPSILON,
    MLP,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
)
from quantcli.archs.fold import GATED, VALUES, FoldRule, Folds
from quantcli.archs.gemma2 import windowed_layers
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, f32, text, u32

_NORMED_FROM = 64
_EVERY = 4
_HEAD_NORMS = (
    layer("attn_q_norm.weight", "self_attn.q_norm.weight", "heads", "head_dim"),
    layer("attn_k_norm.weight", "self_attn.k_norm.weight", "kv_heads", "head_dim"),
)
_FOLDS = Folds(
    rules=(
        FoldRule(
            "norm",
            ("blk.{i}.attn_norm",),
            (
                "blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v",
                "blk.{i}.ffn_gate", "blk.{i}.ffn_up",
            ),
        ),
        VALUES,
        GATED,
        FoldRule("norm", ("output_norm",), ("output",)),
    ),
    basis="its LayerNorm subtracts the mean over the stream's channels",
)  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
}
_DEFAULTS = {"layer_norm_eps": 1e-5, "rope_theta": 10000.0, "logit_scale": 0.0625}
_IGNORED = (r"lm_head\.weight", r".*\.rotary_emb\.inv_freq")


def _rules(config: Config) -> tuple[Rule, ...]:
    norms = _HEAD_NORMS if flag(config, "use_qk_norm") else ()
    return (EMBEDDING, OUTPUT_NORM, NORMS[0], *ATTENTION, *norms, *MLP)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    context = integer(config, "model_max_length", "max_position_embeddings")
    return {
        **decoder_keys(config, dims, epsilon="layer_norm_eps", key=EPSILON),
        "context_length": u32(context),
        **rope_keys(read_rope(config, ("default",))),
        "rope.scaling.type": text("none"),
        "logit_scale": f32(number(config, "logit_scale")),
    }


def _check(config: Config, dims: Dims) -> None:
    check_square(config, dims)
    if flag(config, "use_qk_norm") != (dims["layers"] >= _NORMED_FROM):
        raise ArchitectureError(
            f"config.json of {class_name(config)} has use_qk_norm "
            f"{str(flag(config, 'use_qk_norm')).lower()} with {dims['layers']} layers; llama.cpp "
            f"expects it from {_NORMED_FROM} layers on"
        )


def _windowed_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    types = windowed_layers(config, dims["layers"], integer(config, "sliding_window_pattern"))
    return {
        **_keys(config, dims),
        "rope.dimension_count": u32(dims["head_dim"]),
        "attention.sliding_window": u32(integer(config, "sliding_window")),
        "attention.sliding_window_pattern": array(
            "bool", [kind == "sliding_attention" for kind in types]
        ),
    }


def _config(header: Header) -> dict[str, Any]:
    windowed = "attention.sliding_window" in header.keys
    model = ("Cohere2ForCausalLM", "cohere2") if windowed else ("CohereForCausalLM", "cohere")
    config = decoder_config(header, *model, epsilon="layer_norm_eps", key=EPSILON)
    config |= header.named(logit_scale="logit_scale")
    if not windowed:
        return {**config, "use_qk_norm": "blk.0.attn_q_norm.weight" in header.shapes}
    pattern = header.keys.get("attention.sliding_window_pattern", [])
    return {
        **config,
        "sliding_window": header.keys["attention.sliding_window"],
        "layer_types": ["sliding_attention" if w else "full_attention" for w in pattern],
    }


def _notes(config: Config) -> tuple[str, ...]:
    if class_name(config).startswith("Cohere") and class_name(config).endswith("ForCausalLM"):
        return ()
    return (
        f"transformers leaves logit_scale out of {class_name(config)}; llama.cpp multiplies logits "
        "by it, as the text model alone does",
    )


COHERE = Architecture(
    name="command-r",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    read_notes=_notes,
    defaults=_DEFAULTS,
    fixed=_FIXED,
    ignored=_IGNORED,
    folds=_FOLDS,
)

COHERE2 = Architecture(
    name="cohere2",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_windowed_keys,
    to_config=_config,
    check=check_square,
    read_notes=_notes,
    defaults={**_DEFAULTS, "sliding_window": 4096, "sliding_window_pattern": _EVERY},
    fixed={**_FIXED, "use_qk_norm": (False,), "rotary_pct": (1.0, 1)},
    ignored=_IGNORED,
    folds=_FOLDS,
)
