"""Gemma 1: Llama with a GELU, wide heads and scaled embeddings; llama.cpp's "gemma".

transformers multiplies by 1 + weight in its RMSNorm, so 1 is added. The output matrix is always
the embeddings'; a stored lm_head is left out.
Sources: arXiv:2403.08295, llama.cpp's src/models/gemma.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
)
from quantcli.archs.fold import DECODER
from quantcli.archs.gemma2 import shift_norms
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue


def _rules(config: Config) -> tuple[Rule, ...]:
    return shift_norms((EMBEDDING, OUTPUT_NORM, *NORMS, *ATTENTION, *MLP))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {**decoder_keys(config, dims), **rope_keys(read_rope(config, ("default", "linear")))}


def _config(header: Header) -> dict[str, Any]:
    return decoder_config(header, "GemmaForCausalLM", "gemma")


GEMMA = Architecture(
    name="gemma",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={"head_dim": 256, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    fixed={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (False,),
    },
    ignored=(r"lm_head\.weight", r".*\.rotary_emb\.inv_freq"),
    # A rotation would untie the head, which llama.cpp reads from the embeddings alone.
    folds=replace(DECODER, basis="llama.cpp computes it with tied embeddings only"),
)
