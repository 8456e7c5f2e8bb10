"""Qwen2 and Qwen2.5: Llama's decoder with biases on q, k and v; llama.cpp's "qwen2".

The halves of a head are rotated as in transformers, so no row moves. llama.cpp takes the output
projection to be square, and applies no sliding window (a note says so where a model uses one).
Sources: arXiv:2407.10671, llama.cpp's src/models/qwen2.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, flag
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
    output,
    unwindowed_note,
)
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue

ROPE_TYPES = ("default", "linear", "yarn")
DEFAULTS = {"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}
FIXED = {"hidden_act": ("silu", "swish"), "num_nextn_predict_layers": (0,)}

BIASES = (
    layer("attn_q.bias", "self_attn.q_proj.bias", "q"),
    layer("attn_k.bias", "self_attn.k_proj.bias", "kv"),
    layer("attn_v.bias", "self_attn.v_proj.bias", "kv"),
)


def keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """The key-values that Qwen's generations share."""
    return {**decoder_keys(config, dims), **rope_keys(read_rope(config, ROPE_TYPES))}


def notes(config: Config) -> tuple[str, ...]:
    """A note on the sliding window, if the model uses one."""
    return unwindowed_note(config) if flag(config, "use_sliding_window") else ()


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION, *BIASES, *MLP)


def _config(header: Header) -> dict[str, Any]:
    return decoder_config(header, "Qwen2ForCausalLM", "qwen2")


QWEN2 = Architecture(
    name="qwen2",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=keys,
    to_config=_config,
    check=check_square,
    read_notes=notes,
    defaults=DEFAULTS,
    fixed=FIXED,
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=DECODER,
)
