"""Qwen3: Qwen2 without biases, with an RMSNorm on each head of q and k; llama.cpp's "qwen3".

Refused: ``attention_bias``, for which llama.cpp has no output bias here.
Sources: arXiv:2505.09388, llama.cpp's src/models/qwen3.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    MLP,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    output,
)
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.qwen2 import DEFAULTS, FIXED, keys, notes
from quantcli.archs.rules import Rule


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION, *HEAD_NORMS, *MLP)


def _config(header: Header) -> dict[str, Any]:
    return decoder_config(header, "Qwen3ForCausalLM", "qwen3")


QWEN3 = Architecture(
    name="qwen3",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=keys,
    to_config=_config,
    read_notes=notes,
    defaults={**DEFAULTS, "head_dim": 128},
    fixed={**FIXED, "attention_bias": (False,)},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=DECODER,
)
