"""What models that read a text in both directions have in common: BERT and what came after.

They make a vector of each token and no logits; a classifier (a reranker is one with a single
score) takes the first token's, or the mean of all. In GGUF the classifier is two matrices: ``cls``,
followed by tanh (in ModernBERT by GELU and a norm), and ``cls.output``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.header import Header
from quantcli.archs.rules import Dims
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, boolean, u32

RANK = 4
"""LLAMA_POOLING_TYPE_RANK: the classifier's scores."""


def is_classifier(config: Config) -> bool:
    """Whether the class ends in a classifier."""
    return class_name(config).endswith("ForSequenceClassification")


def count_labels(config: Config) -> int:
    """How many scores a classifier gives; transformers takes 2 where nothing is said."""
    labels = config.get("id2label")
    if labels is None:
        return integer(config, "num_labels", default=2)
    if not isinstance(labels, Mapping) or not labels:
        raise ArchitectureError(
            f"id2label of {class_name(config)} in config.json is {labels!r}, expected an object"
        )
    return len(labels)


def encoder_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """The key-values of an encoder besides its sizes; ``types`` rows of segment embeddings."""
    keys = {"attention.causal": boolean(False)}
    if "types" in dims:
        keys["tokenizer.ggml.token_type_count"] = u32(dims["types"])
    return keys | (classifier_keys(config, dims) if is_classifier(config) else {})


def classifier_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """The key-values of a classifier with so many ``labels``, of which a single one has no name."""
    keys = {"pooling_type": u32(RANK)}
    if dims["labels"] > 1:
        keys["classifier.output_labels"] = array("str", _labels(config, dims["labels"]))
    return keys


def encoder_dims(config: Config) -> dict[str, int]:
    """``labels`` of a classifier."""
    return {"labels": count_labels(config)} if is_classifier(config) else {}


def classifier_config(header: Header, stem: str) -> dict[str, Any]:
    """The class, ``stem`` + "Model" or a classifier, and its labels, as a GGUF tells them."""
    if "cls.output.weight" not in header.shapes:
        return {"architectures": [f"{stem}Model"]}
    count = header.shapes["cls.output.weight"][0]
    labels = header.keys.get("classifier.output_labels") or [f"LABEL_{i}" for i in range(count)]
    return {
        "architectures": [f"{stem}ForSequenceClassification"],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def _labels(config: Config, count: int) -> list[str]:
    labels = config.get("id2label") or {}
    return [str(labels.get(str(number), f"LABEL_{number}")) for number in range(count)]
