"""Arcee's AFM: Llama whose MLP squares a ReLU in place of a gate; llama.cpp's "arcee".

Refused: biases, which no published model has.
Sources: Arcee's model cards, transformers' modeling_arcee.py, llama.cpp's src/models/arcee.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
from quantcli.archs.decoder import attention_dims, decoder_config
from quantcli.archs.fold import DECODER, Folds
from quantcli.archs.header import Header
from quantcli.archs.llama import keys, rules
from quantcli.archs.rules import Rule

_FOLDS = Folds(
    rules=tuple(rule for rule in DECODER.rules if rule.kind != "gated"),
    writers=DECODER.writers,
    basis="",
    apart=("blk.{i}.ffn_down",),
)


def _rules(config: Config) -> tuple[Rule, ...]:
    return tuple(rule for rule in rules(config) if rule.name != "blk.{i}.ffn_gate.weight")


def _config(header: Header) -> dict[str, Any]:
    return decoder_config(header, "ArceeForCausalLM", "arcee")


ARCEE = Architecture(
    name="arcee",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=keys,
    to_config=_config,
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    fixed={"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=_FOLDS,
)
