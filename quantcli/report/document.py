"""Everything about a model as one JSON object: exact numbers, no text made for the eye.

A number that cannot be told is null. What is not JSON (NaN, infinities, bytes that are not UTF-8)
becomes null or escaped text, so that any reader can take the object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from quantcli.report.inspection import StoredTensor, Subject
from quantcli.report.memory import memory_table
from quantcli.report.stats import OUTLIER_RATIO, WeightStats
from quantcli.report.weights import WeightSource
from quantcli.types import MetaValue

_SHOWN_ITEMS = 6


def model_document(
    subject: Subject, chosen: Sequence[StoredTensor], *, full_values: bool = False
) -> dict[str, Any]:
    """The model and the ``chosen`` tensors; ``full_values`` keeps long arrays whole."""
    return {
        "kind": subject.kind,
        "label": subject.label,
        **asdict(subject.facts),
        "tokenizer": subject.tokenizer,
        "pre_tokenizer": subject.pre_tokenizer,
        "parameters": {
            "total": subject.parameters,
            "active": subject.active_parameters,
            "embedding": subject.embedding_parameters,
            "tied_embedding": subject.is_tied if subject.outputs else None,
        },
        "bytes": subject.nbytes,
        "bits_per_weight": subject.bits_per_weight,
        "file_type": subject.file_type,
        "files": [{"path": str(path), "bytes": size} for path, size in subject.files.items()],
        "dtypes": [
            {"dtype": dtype, "tensors": count, "weights": elements, "bytes": nbytes}
            for dtype, count, elements, nbytes in subject.dtypes()
        ],
        "memory": [
            {"precision": each.name, "bits": each.bits, "bytes": each.nbytes}
            for each in memory_table(subject.parameters)
        ],
        "quantized": [
            {
                "type": each.name,
                "bytes": each.nbytes,
                "bits_per_weight": each.bits_per_weight,
                "needs_imatrix": each.needs_importance,
            }
            for each in subject.sizes
        ],
        "metadata": {
            key: _value_document(value, full_values) for key, value in subject.metadata.items()
        },
        "tensors": [_tensor_document(tensor) for tensor in chosen],
        "notes": list(subject.notes),
    }


def _tensor_document(tensor: StoredTensor) -> dict[str, Any]:
    info = tensor.info
    return {
        "name": info.name,
        "gguf": list(tensor.becomes),
        "shape": list(info.shape),
        "dtype": info.dtype,
        "weights": info.elements,
        "bytes": info.nbytes,
        "bits_per_weight": tensor.bits_per_weight,
        "file": info.file.name,
    }


def _value_document(value: MetaValue, full: bool) -> dict[str, Any]:
    if not value.kind.startswith("["):
        return {"kind": value.kind, "value": _plain(value.value)}
    shown = list(map(_plain, value.value if full else value.value[:_SHOWN_ITEMS]))
    found = {"kind": value.kind, "length": len(value.value)}
    # A shortened array must not pass for the whole one.
    return {**found, "value" if len(shown) == len(value.value) else "first": shown}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float):
        return _number(value)
    return value


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def stats_document(
    sources: Iterable[WeightSource], pairs: Iterable[tuple[str, WeightStats]], channels: int
) -> list[dict[str, Any]]:
    """The statistics, with the ``channels`` largest input channels of each tensor."""
    by_name: Mapping[str, WeightSource] = {source.name: source for source in sources}
    return [
        {
            "name": name,
            "shape": list(by_name[name].shape),
            "dtype": by_name[name].dtype,
            "weights": stats.moments.count + stats.nonfinite,
            "nonfinite": stats.nonfinite,
            "min": _number(stats.moments.low),
            "max": _number(stats.moments.high),
            "mean": _number(stats.moments.mean),
            "std": _number(stats.moments.std),
            "kurtosis": _number(stats.moments.kurtosis),
            "outliers": {
                "beyond_row_rms": OUTLIER_RATIO,
                "count": stats.outlier_count,
                "share": stats.outlier_share,
            },
            "channels": {
                "median_abs_max": _number(stats.median_abs_max),
                "top": [asdict(channel) for channel in stats.channels(channels)],
            },
        }
        for name, stats in pairs
    ]
