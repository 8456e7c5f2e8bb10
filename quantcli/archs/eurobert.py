"""EuroBERT: Llama that reads in both directions; llama.cpp's "eurobert".

Sources: arXiv:2503.05500, transformers' modeling_eurobert.py, llama.cpp's src/models/eurobert.cpp.
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
    check_square,
    decoder_config,
    decoder_keys,
)
from quantcli.archs.encoder import encoder_keys
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue

_RULES = (EMBEDDING, OUTPUT_NORM, *NORMS, *ATTENTION, *MLP)


def _rules(config: Config) -> tuple[Rule, ...]:
    return _RULES


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(read_rope(config, ("default",))),
        **encoder_keys(config, dims),
    }


def _config(header: Header) -> dict[str, Any]:
    return decoder_config(header, "EuroBertModel", "eurobert")


EUROBERT = Architecture(
    name="eurobert",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 250000.0},
    fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
    ignored=(r"lm_head\.(weight|bias)", r".*\.rotary_emb\.inv_freq"),
    published=((r"^model\.", ""),),
)
