"""OLMo 1: Llama with LayerNorms that have no weights, and clipped q, k and v; llama.cpp's "olmo".

Sources: arXiv:2402.00838, transformers' modeling_olmo.py, llama.cpp's src/models/olmo.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    EPSILON,
    MLP,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    output,
)
from quantcli.archs.fold import GATED, Folds
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, f32

_ROTATED = (
    replace(ATTENTION[0], rotary="heads"),
    replace(ATTENTION[1], rotary="kv_heads"),
    *ATTENTION[2:],
)
_FOLDS = Folds(
    rules=(GATED,),
    basis="its LayerNorm subtracts the mean over the stream's channels",
    apart=(
        "blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v", "blk.{i}.attn_output",
        "blk.{i}.ffn_gate", "blk.{i}.ffn_up",
    ),
)  # fmt: skip


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, output(config), *_ROTATED, *MLP)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    # The epsilon is written in transformers' code, not in config.json.
    keys = decoder_keys({**config, "epsilon": 1e-5}, dims, epsilon="epsilon", key=EPSILON)
    keys |= rope_keys(read_rope(config, ("default", "linear")))
    if config.get("clip_qkv") is not None:
        # transformers clamps to the number as it is; ggml needs it above 0.
        keys["attention.clamp_kqv"] = f32(positive(config, "clip_qkv"))
    return keys


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "OlmoForCausalLM", "olmo", epsilon="epsilon", key=EPSILON)
    config.pop("epsilon", None)
    return {**config, **header.named(clip_qkv="attention.clamp_kqv")}


OLMO = Architecture(
    name="olmo",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={"rope_theta": 10000.0},
    fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,)},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=_FOLDS,
)
