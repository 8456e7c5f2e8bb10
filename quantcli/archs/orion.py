"""Orion 14B: Llama with LayerNorms, whose epsilon is called ``rms_norm_eps``; "orion".

The class comes with the checkpoints alone.
Sources: arXiv:2401.12246, the checkpoints' modeling_orion.py, llama.cpp's src/models/orion.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    EPSILON,
    MLP,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    biased,
    check_square,
    decoder_config,
    decoder_keys,
)
from quantcli.archs.fold import GATED_LAYER_NORMED
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT, *biased(OUTPUT_NORM, *NORMS), *ATTENTION, *MLP)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = read_rope(config, ("default", "linear"))
    return {**decoder_keys(config, dims, key=EPSILON), **rope_keys(rope)}


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "OrionForCausalLM", "orion", key=EPSILON)
    return {**config, "hidden_act": "silu"}


ORION = Architecture(
    name="orion",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={"rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=GATED_LAYER_NORMED,
)
