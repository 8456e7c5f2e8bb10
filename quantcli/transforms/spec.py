"""What a transform found: an operation for each tensor that it touches.

Operations are linear maps of one tensor's rows and columns, so they apply to slabs of rows as
these are read. What a transform changes about a model beyond its weights (a head that is no
longer tied to the embeddings) follows from the operations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from quantcli.formats.base import Floats
from quantcli.transforms.orthogonal import Permutation, Rotation

TRANSFORM_FORMAT = "quantcli.transform/1"
_ROTATIONS = {"across": "columns_rotation", "down": "rows_rotation"}
"""Keys of the file, whose hash a transformed model records."""
_FACTORS, _ORDER = ("signs", "left", "right"), ("order",)


@dataclass(frozen=True, slots=True)
class RotationRef:
    """The rotation or permutation of that name, over rows or columns ``first:last`` in consecutive
    groups."""

    rotation: str
    first: int
    last: int


@dataclass(frozen=True)
class Operation:
    """W' = P^T diag(rows) W diag(columns) Q for a tensor of rows W; P and Q are rotations
    or permutations.

    ``columns`` has shape (columns,), or (matrices, columns) for a stack whose matrices differ;
    ``rows`` has one factor for each row, leading axes flattened. ``columns_rotation`` is Q,
    ``rows_rotation`` is P. A tensor with one axis is one row. ``source`` is another tensor to take
    W from. ``values``, float32, replaces the whole: nothing else may be given then.
    """

    columns: Floats | None = None
    rows: Floats | None = None
    columns_rotation: RotationRef | None = None
    rows_rotation: RotationRef | None = None
    source: str | None = None
    values: Floats | None = None


@dataclass(frozen=True)
class TransformSpec:
    """A method's result: what to do to which tensor; ``settings`` say how it was found."""

    method: str
    operations: Mapping[str, Operation]
    rotations: Mapping[str, Rotation | Permutation] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def merge_scales(parts: Iterable[Mapping[str, Operation]]) -> dict[str, Operation]:
    """Scalings of several groups as one: factors that meet on a tensor are multiplied."""
    merged: dict[str, Operation] = {}
    for part in parts:
        for name, operation in part.items():
            before = merged.get(name, Operation())
            merged[name] = replace(
                before,
                columns=_product(before.columns, operation.columns),
                rows=_product(before.rows, operation.rows),
            )
    return merged


def dump_transform(transform: TransformSpec) -> bytes:
    """The transform as bytes, whose hash a model records; equal transforms give equal bytes."""
    arrays: dict[str, NDArray[Any]] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name in sorted(transform.operations):
        operation = transform.operations[name]
        entry: dict[str, Any] = {}
        for key in ("columns", "rows", "values"):
            if (array := getattr(operation, key)) is not None:
                arrays[f"{name}/{key}"] = np.ascontiguousarray(array, np.float32)
        for key, field_name in _ROTATIONS.items():
            if (turn := getattr(operation, field_name)) is not None:
                entry[key] = [turn.rotation, turn.first, turn.last]
        if operation.source is not None:
            entry["source"] = operation.source
        plain[name] = entry
    for name, rotation in sorted(transform.rotations.items()):
        for key in _ORDER if isinstance(rotation, Permutation) else _FACTORS:
            arrays[f"rotations/{name}/{key}"] = np.ascontiguousarray(getattr(rotation, key))
    facts = {
        "format": TRANSFORM_FORMAT,
        "method": transform.method,
        "operations": json.dumps(plain, sort_keys=True),
        "rotations": json.dumps(sorted(transform.rotations)),
        "settings": json.dumps(dict(transform.settings), sort_keys=True),
    }
    # The library writes metadata in a random order; one string has one order.
    return bytes(save(arrays, {"quantcli": json.dumps(facts, sort_keys=True)}))


def _product(first: Floats | None, second: Floats | None) -> Floats | None:
    if first is None or second is None:
        return second if first is None else first
    return np.asarray(first * second, np.float32)
