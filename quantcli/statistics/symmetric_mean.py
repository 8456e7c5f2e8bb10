"""A mean of x x^T that stays in the file of its sum, of which some rows are read at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.scratch import forget_pages
from quantcli.formats.base import Floats

_ROWS = 1024
"""Rows of which a page each is read before they are let go."""


@dataclass(frozen=True, eq=False)
class SymmetricMean:
    """``total`` (columns, columns) over ``count``; NumPy takes it for an array, which is a copy.

    What is off the diagonal counts for a ``share``; ``added`` comes on top.
    """

    total: NDArray[np.float64]
    count: int
    share: float = 1.0
    added: NDArray[np.float64] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Columns, twice."""
        return len(self.total), len(self.total)

    def rows(self, rows: slice) -> Floats:
        """Some rows, float32."""
        found = np.empty(self.total[rows].shape, np.float32)
        np.divide(self.total[rows], self.count, out=found, casting="unsafe")
        forget_pages(self.total)
        if self.share < 1:
            own = found[:, rows].diagonal().copy()
            found *= np.float32(self.share)
            np.fill_diagonal(found[:, rows], own)
        if self.added is not None:
            found += self.added[rows].astype(np.float32)
        return found

    def diagonal(self) -> Floats:
        """The mean squares."""
        found = np.empty(len(self.total), np.float32)
        for start in range(0, len(found), _ROWS):
            rows = slice(start, start + _ROWS)
            found[rows] = self.total[rows, rows].diagonal() / self.count
            forget_pages(self.total)
        return found if self.added is None else found + self.added.diagonal().astype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.rows(slice(0, len(self.total))).astype(dtype or np.float32)


Mean = Floats | SymmetricMean


def read_rows(mean: Mean, rows: slice) -> Floats:
    """Some rows of a mean, float32."""
    if isinstance(mean, SymmetricMean):
        return mean.rows(rows)
    return np.asarray(mean[rows], np.float32)
