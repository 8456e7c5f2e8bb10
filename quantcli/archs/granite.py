"""Granite 3 and 4, the dense models: Llama with four multipliers; llama.cpp's "granite".

Embeddings, the residual branches and attention's scores are multiplied, and logits divided, by
numbers that are key-values here. Rows of q and k are interleaved as Llama's are.

Refused: biases, which no published model has.
Sources: IBM's model cards, transformers' modeling_granite.py, llama.cpp's src/models/granite.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, number
from quantcli.archs.decoder import attention_dims, decoder_config
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.llama import keys, rules
from quantcli.archs.rules import Dims
from quantcli.types import MetaValue, f32

_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    scales = {theirs: f32(number(config, ours)) for ours, theirs in _MULTIPLIERS.items()}
    return {**keys(config, dims), **scales}


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "GraniteForCausalLM", "granite")
    return {**config, **header.named(**_MULTIPLIERS)}


GRANITE = Architecture(
    name="granite",
    read_dims=attention_dims,
    read_rules=rules,
    to_keys=_keys,
    to_config=_config,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        **dict.fromkeys(_MULTIPLIERS, 1.0),
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=DECODER,
)
