"""Round to nearest on the grids of a folder, with ranges that may be weighted by importance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.largest_weights import LargestWeights
from quantcli.formats import native
from quantcli.formats.base import Floats
from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import GridCodes
from quantcli.plan.folders import FolderPlan
from quantcli.plan.schemes import Scheme
from quantcli.sources.imatrix import Importance
from quantcli.types import Matrix, TensorStore

CodeSource = Callable[[Matrix, int, NDArray[Any]], GridCodes]
"""Gives the codes of a matrix's rows from a row on: takes the matrix, that row, and the stored
rows, in their stored dtype. Called from several threads, the rows of a matrix in any order."""


def column_weights(
    importance: Importance | None, matrix: Matrix, used: bool
) -> NDArray[np.float32] | None:
    """The importance of a matrix's columns as they are stored, or None when none is ``used``."""
    if importance is None or not used:
        return None
    weights = importance.weights(matrix.tensor, matrix.of, matrix.columns)
    if weights is None:
        return None
    own: NDArray[np.float32] = weights[matrix.index]
    return own if matrix.turned is None else own[np.argsort(matrix.turned.turned_columns)]


class RoundToNearest:
    """A `CodeSource`; what a whole matrix shares is found when its first rows are asked for."""

    def __init__(
        self, plan: FolderPlan, store: TensorStore, importance: Importance | None, slab: int
    ) -> None:
        self._schemes = {i.matrix.module: i.scheme for i in plan.items if i.scheme is not None}
        self._store = store
        self._importance = importance
        self._used = {item.matrix.module for item in plan.items if item.importance}
        self._slab = slab
        self._largest = LargestWeights(store, [item.matrix for item in plan.items])
        self._ranges: dict[tuple[str, int], tuple[Floats, NDArray[Any] | None]] = {}
        self._locks: defaultdict[tuple[str, int], Lock] = defaultdict(Lock)
        self._lock = Lock()

    def __call__(self, matrix: Matrix, start: int, rows: NDArray[Any]) -> GridCodes:
        """The codes of these rows."""
        scheme = self._schemes[matrix.module]
        grid = scheme.grid
        # The kernels of small floats convert on the way.
        floats = rows if isinstance(grid, FloatGrid) else native.to_float32(rows)
        if grid.needs_whole:
            grid = grid.bind(self._largest(matrix))
        if grid.strategy != "tensor":
            scales, zeros = grid.fit(floats, self._weights(matrix), scheme.search)
        elif grid.whole is None:
            scales, zeros = self._tensor_range(matrix, scheme)
        else:
            scales, zeros = grid.fit_tensor(lambda: [floats])
        return GridCodes(grid.quantize(floats, scales, zeros), scales, zeros, grid.whole)

    def _weights(self, matrix: Matrix) -> NDArray[np.float32] | None:
        return column_weights(self._importance, matrix, matrix.module in self._used)

    def _tensor_range(self, matrix: Matrix, scheme: Scheme) -> tuple[Floats, NDArray[Any] | None]:
        key = matrix.source, matrix.first
        with self._lock:
            own = self._locks[key]
        with own:
            if key not in self._ranges:
                self._ranges[key] = scheme.grid.fit_tensor(
                    lambda: self._slabs(matrix), self._weights(matrix), scheme.search
                )
            return self._ranges[key]

    def _slabs(self, matrix: Matrix) -> Iterator[Floats]:
        last = matrix.first + matrix.rows
        step = max(1, self._slab // (4 * matrix.columns))
        for start in range(matrix.first, last, step):
            rows = self._store.read_rows(matrix.source, start, min(start + step, last))
            yield native.to_float32(rows)
