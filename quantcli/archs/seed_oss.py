"""Seed-OSS: Qwen2's decoder with heads of any size; llama.cpp's "seed_oss".

llama.cpp calls the norm before the MLP the one after attention.

Refused: biases on the attention's output or in the MLP, which llama.cpp does not have.
Sources: ByteDance's model card, transformers' modeling_seed_oss.py, llama.cpp's
src/models/seed-oss.cpp.
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
    decoder_config,
    layer,
    output,
)
from quantcli.archs.fold import DECODER, FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.qwen2 import BIASES, keys
from quantcli.archs.rules import Rule

_NORM = layer("post_attention_norm.weight", "post_attention_layernorm.weight", "hidden")
_FOLDS = Folds(
    rules=(
        FoldRule("norm", ("blk.{i}.post_attention_norm",), ("blk.{i}.ffn_gate", "blk.{i}.ffn_up")),
        *(rule for rule in DECODER.rules if rule.producers != ("blk.{i}.ffn_norm",)),
    ),
    writers=DECODER.writers,
    basis="",
)


def _rules(config: Config) -> tuple[Rule, ...]:
    biases = BIASES if flag(config, "attention_bias") else ()
    return (EMBEDDING, OUTPUT_NORM, output(config), NORMS[0], _NORM, *ATTENTION, *biases, *MLP)


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "SeedOssForCausalLM", "seed_oss")
    return {**config, "attention_bias": "blk.0.attn_q.bias" in header.shapes}


SEED_OSS = Architecture(
    name="seed_oss",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=keys,
    to_config=_config,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "attention_bias": True,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_out_bias": (False,),
        "mlp_bias": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=_FOLDS,
)
