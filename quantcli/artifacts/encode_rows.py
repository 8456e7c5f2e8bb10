"""Rows of a tensor in the block format that a plan gives it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.formats import FORMATS, get_format, native
from quantcli.plan.planner import TensorPlan
from quantcli.sources.imatrix import Importance

_scratch = threading.local()
"""Each thread's buffer for encoded rows: a fresh one would cost a page fault for every 4 KB."""


def encode_rows(
    item: TensorPlan, start: int, rows: NDArray[Any], importance: Importance | None
) -> NDArray[np.uint8]:
    """Packed rows of a tensor from row ``start`` on, in a buffer of the thread's own.

    ``rows`` are as the model stores them. UnencodableError for a value that the format cannot hold.
    """
    tensor = item.tensor
    if tensor.dtype == item.format and rows.dtype == np.uint8:
        return rows
    if rows.dtype == np.uint8 and tensor.dtype in FORMATS:
        rows = native.decode(get_format(tensor.dtype), rows)
    fmt = get_format(item.format)
    out = None
    if tensor.dtype != fmt.name:
        out = _buffer(len(rows), fmt.row_bytes(tensor.columns))
    return native.encode(fmt, rows, _importance_of(item, start, importance), out=out)


def _importance_of(
    item: TensorPlan, start: int, importance: Importance | None
) -> NDArray[np.float32] | None:
    if importance is None or not item.importance:
        return None
    tensor = item.tensor
    # The legacy form stores the weights of a stack's matrices as one row.
    matrices = tensor.matrices
    weights = importance.weights(tensor.name, matrices, tensor.columns)
    return None if weights is None else weights[start * matrices // tensor.rows]


def _buffer(rows: int, row_bytes: int) -> NDArray[np.uint8]:
    """A packed array of the thread's own, until it asks for the next one."""
    held: NDArray[np.uint8] = getattr(_scratch, "held", np.empty(0, np.uint8))
    if held.size < rows * row_bytes:
        held = _scratch.held = np.empty(rows * row_bytes, np.uint8)
    return held[: rows * row_bytes].reshape(rows, row_bytes)
