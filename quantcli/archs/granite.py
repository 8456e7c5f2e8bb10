"""Granite 3 and 4, the dense models: Llama with four multipliers; llama.cpp's "granite".

Embeddings, the residual branches and attention's scores are multiplied, and logits divided, by
numbers that are key-values here. Rows of q and k are interleaved as Llama's are.

Refused: biases, which no published model has.
Sources: IBM's model cards, transformers' modeling_granite.py, llama.cpp's src/models/granite.cpp.
"""

from __future__ import annotations

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, number
from quantcli.archs.decoder import attention_dims
from quantcli.archs.fold import DECODER
from quantcli.archs.granite_config import MULTIPLIERS, rebuilt
from quantcli.archs.llama import keys as llama_keys
from quantcli.archs.llama import rules
from quantcli.archs.rules import Dims
from quantcli.types import MetaValue, f32


def keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """Llama's key-values and the multipliers."""
    scales = {theirs: f32(number(config, ours)) for ours, theirs in MULTIPLIERS.items()}
    return {**llama_keys(config, dims), **scales}


DEFAULTS = {
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    **dict.fromkeys(MULTIPLIERS, 1.0),
}
FIXED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
IGNORED = (r".*\.rotary_emb\.inv_freq",)

GRANITE = Architecture(
    name="granite",
    read_dims=attention_dims,
    read_rules=rules,
    to_keys=keys,
    to_config=rebuilt,
    defaults=DEFAULTS,
    fixed=FIXED,
    ignored=IGNORED,
    folds=DECODER,
)
