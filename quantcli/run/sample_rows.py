"""Rows of a matrix that stand for all of them where it is too large to try every type on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROWS = 8192
"""Rows that are encoded at once."""
_RUN = 16
"""Of a large tensor so many neighbouring rows are taken at once."""
_ENOUGH = 1 << 22
"""Weights of a tensor that are encoded; of a larger one, the runs of rows that matter most."""


def sample_rows(weights: NDArray[np.float64], columns: int) -> list[tuple[int, int]]:
    """Runs of rows, start and stop, that stand for all rows, each of ``columns`` weights.

    All of them where these are not too many; else the runs of neighbours that ``weights``, one for
    each row, make the most of.
    """
    rows = len(weights)
    if rows * columns <= _ENOUGH:
        return [(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)]
    firsts = np.arange(0, rows, _RUN)
    count = max(1, _ENOUGH // (columns * _RUN))
    most = np.argsort(-np.add.reduceat(weights, firsts), kind="stable")[:count]
    return [(int(first), min(int(first) + _RUN, rows)) for first in np.sort(firsts[most])]
