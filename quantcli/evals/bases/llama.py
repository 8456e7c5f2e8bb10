"""llama.cpp's rows of base log-probabilities: 16 bits for each token of the vocabulary.

A row is a float32 scale, a float32 lowest log-probability and the codes, padded to an even
number of them: log p = scale * code + lowest. Logits more than 16 nats below the largest are
lifted to that floor, so a step is at most 16/65535 nats. Source: ``log_softmax`` and
``process_logits`` of llama.cpp's tools/perplexity, whose float32 arithmetic is repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.evals.scores import Comparison, Doubles, Floats, Ids, blocks, compare_rows

MAGIC = b"_logits_"

_RANGE = np.float32(16)
_LEVELS = np.float32(65535)


def row_type(vocabulary: int) -> np.dtype[Any]:
    """A row's fields."""
    padded = 2 * ((vocabulary + 1) // 2)
    return np.dtype([("scale", "<f4"), ("lowest", "<f4"), ("codes", "<u2", (padded,))])


def encode(logits: Floats, targets: Ids) -> NDArray[Any]:
    """Rows of logits (positions, vocabulary); ``targets`` are not part of them."""
    rows = np.zeros(len(logits), row_type(logits.shape[1]))
    for part in blocks(logits):
        _encode(logits[part], rows[part])
    return rows


def _encode(logits: Floats, rows: NDArray[Any]) -> None:
    top = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), top - _RANGE)
    sums = np.exp(logits - top).sum(axis=1, dtype=np.float64, keepdims=True)
    scale = (top - low) / _LEVELS
    # Where all logits are equal every code is 0, whatever it is divided by.
    inverse = np.float32(1) / np.where(scale > 0, scale, np.float32(1))
    rows["scale"], rows["lowest"] = scale[:, 0], (low - top - np.log(sums).astype(np.float32))[:, 0]
    codes = np.rint(inverse * (logits - low))
    rows["codes"][:, : logits.shape[1]] = np.where(logits > low, codes, 0)


def largest(rows: NDArray[Any]) -> Floats:
    """The largest log-probability of each row, infinite where its scale is none."""
    with np.errstate(over="ignore"):
        above = rows["scale"] * rows["codes"].max(axis=1)
    found: Floats = np.where(rows["scale"] < 0, np.float32(np.inf), above + rows["lowest"])
    return found


class LlamaBase:
    """One window's rows, as a `quantcli.evals.scores.Base`."""

    def __init__(self, rows: NDArray[Any], vocabulary: int) -> None:
        self._rows = rows
        self._vocabulary = vocabulary

    def log_probs(self, part: slice) -> Doubles:
        """Log-probabilities of some positions, rounded to float32 as llama.cpp reads them."""
        rows = self._rows[part]
        codes = rows["codes"][:, : self._vocabulary].astype(np.float32)
        found: Doubles = (rows["scale"][:, None] * codes + rows["lowest"][:, None]).astype(
            np.float64
        )
        return found

    def compare(self, logits: Floats, targets: Ids) -> tuple[Doubles, Comparison]:
        """See `quantcli.evals.scores.Base.compare`."""
        return compare_rows(self.log_probs, logits, targets)
