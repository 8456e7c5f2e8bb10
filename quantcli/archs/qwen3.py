"""Qwen3: Qwen2 without biases, with an RMSNorm on each head of q and k; llama.cpp's "qwen3".

As a classifier it scores the last token. llama.cpp makes probabilities of the scores (a note says
so), which of a single score is always 1.

Refused: ``attention_bias``, for which llama.cpp has no output bias here, and a single label.
Sources: arXiv:2505.09388, llama.cpp's src/models/qwen3.cpp and ``build_pooling``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name
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
from quantcli.archs.encoder import classifier_config, classifier_keys, encoder_dims
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.qwen2 import DEFAULTS, FIXED, keys, notes
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION, *HEAD_NORMS, *MLP)


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "Qwen3ForCausalLM", "qwen3")
    if "cls.output.weight" in header.shapes:
        config |= classifier_config(header, "Qwen3")
    return config


def _classifier_dims(config: Config) -> dict[str, int]:
    return {**attention_dims(config), **encoder_dims(config)}


def _classifier_rules(config: Config) -> tuple[Rule, ...]:
    score = Rule("cls.output.weight", "score.weight", ("labels", "hidden"))
    return (*(rule for rule in _rules(config) if rule.name != "output.weight"), score)


def _classifier_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {**keys(config, dims), **classifier_keys(config, dims)}


def _check_labels(config: Config, dims: Dims) -> None:
    if dims["labels"] == 1:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has a single label, of which llama.cpp makes a "
            "probability that is always 1",
            hint="quantize the Qwen3ForCausalLM that it was made from, and compare the logits of "
            "its two answers",
        )


def _classifier_notes(config: Config) -> tuple[str, ...]:
    return (
        *notes(config),
        f"llama.cpp gives the softmax of the scores of {class_name(config)}, transformers the "
        "scores themselves",
    )


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
QWEN3_CLASSIFIER = replace(
    QWEN3,
    read_dims=_classifier_dims,
    read_rules=_classifier_rules,
    to_keys=_classifier_keys,
    check=_check_labels,
    read_notes=_classifier_notes,
)
