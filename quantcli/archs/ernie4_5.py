"""ERNIE 4.5, the dense models: Llama that rotates neighbouring values; llama.cpp's "ernie4_5".

transformers rotates neighbours too, so no row moves.

Refused: biases, which no published model has.
Sources: Baidu's ERNIE 4.5 report, transformers' modeling_ernie4_5.py, llama.cpp's
src/models/ernie4-5.cpp.
"""

from __future__ import annotations

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
    output,
)
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION, *MLP)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {**decoder_keys(config, dims), **rope_keys(read_rope(config, ("default",)))}


def _config(header: Header) -> dict[str, Any]:
    return decoder_config(header, "Ernie4_5ForCausalLM", "ernie4_5")


ERNIE4_5 = Architecture(
    name="ernie4_5",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
    },
    fixed={"hidden_act": ("silu", "swish"), "use_bias": (False,)},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=DECODER,
)
