"""The error that a grid makes in a matrix's output, as a function of its columns' scales.

With W the weights, s the scales, Q the grid and H the mean of x x^T, the error of the outputs is
tr(E H E^T), E = Q(W diag(s)) diag(1/s) - W: no sample of inputs is needed, and all scales are
compared on the same inputs. The grid is the one that the tensor will be written in, block scales
and importance weights included.

Where error feedback comes next, later columns compensate most of that error. What is left is tr(E D
E^T) with D the pivots of H (`quantcli.statistics.hessian`), if E is what rounding the fed-back
weights leaves; that of the weights themselves approximates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.fold import FoldGroup
from quantcli.errors import PlanError
from quantcli.formats import get_format, native
from quantcli.formats.base import Floats
from quantcli.formats.integer import GridCodes, Search
from quantcli.layouts.base import CodeGrid
from quantcli.model import Model
from quantcli.statistics.hessian import output_error, prepare_hessian
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.types import OutputTensor

RoundRows = Callable[[Floats, Floats | None], Floats]
"""Rounds float32 rows (n, columns), with an importance per column or None, to their nearest."""

SAMPLE = 512
"""Rows of a matrix that scales are compared on."""
_SLAB = 256
"""Rows at a time."""
_RUN = 16
"""Sampled rows come in runs, which cost one read each."""


def block_grid(name: str) -> RoundRows:
    """The block format ``name`` as a grid: encoded and decoded again by our kernels."""
    fmt = get_format(name)

    def round_rows(rows: Floats, importance: Floats | None) -> Floats:
        return native.decode(fmt, native.encode(fmt, rows, importance))

    return round_rows


def folder_grid(grid: CodeGrid, search: Search = "minmax") -> RoundRows:
    """A folder's grid with scales found by ``search``; not for strategy "tensor".

    PlanError for a scale of a whole tensor, which cannot be found on a few rows.
    """
    if grid.strategy == "tensor":
        raise PlanError(
            "one scale for a whole tensor leaves nothing to gain by scaling channels",
            hint="a scale per group or per channel",
        )

    def round_rows(rows: Floats, importance: Floats | None) -> Floats:
        own = grid.bind(float(np.abs(rows).max()))
        scales, zeros = own.fit(rows, importance, search)
        return own.dequantize(GridCodes(own.quantize(rows, scales, zeros), scales, zeros))

    return round_rows


def block_grids(formats: Mapping[str, str]) -> dict[str, RoundRows]:
    """Grids by tensor, from a plan's format of each."""
    by_format = {name: block_grid(name) for name in set(formats.values())}
    return {tensor: by_format[name] for tensor, name in formats.items()}


@dataclass(frozen=True, eq=False)
class ConsumerMatrix:
    """One matrix that reads a group's channels: its rows, its inputs, the grid it will be in.

    ``share`` is the part of all tokens that it sees.
    """

    model: Model
    tensor: OutputTensor
    matrix: int
    load: Callable[[str, int], Floats]
    """The Hessian of a tensor's matrix: of many experts never all are held."""
    grid: RoundRows
    share: float = 1.0
    weighted: bool = True
    """Whether rounding knows the columns' importance, the diagonal of H."""
    pivots: Callable[[str, int], Floats] | None = None
    """Likewise the pivots of H, where feedback comes next."""

    @property
    def hessian(self) -> Floats:
        """The mean of x x^T over the matrix's inputs."""
        return self.load(self.tensor.name, self.matrix)

    @property
    def squares(self) -> Floats:
        """The weight of each column's error: the diagonal of H, or its pivots."""
        if self.pivots is not None:
            return self.pivots(self.tensor.name, self.matrix)
        return self.hessian.diagonal()

    @property
    def height(self) -> int:
        """Rows of the matrix."""
        matrices = self.tensor.matrices
        return self.tensor.rows // matrices

    def slabs(self, most: int | None = None) -> Iterator[Floats]:
        """The matrix's rows, or about ``most`` of them evenly spread over it."""
        start = self.matrix * self.height
        runs = range(0, self.height, _SLAB)
        length = _SLAB
        if most is not None and most < self.height:
            runs = range(0, self.height, max(_RUN, self.height * _RUN // most))
            length = _RUN
        for first in runs:
            last = min(first + length, self.height)
            yield self.model.read_floats(self.tensor, start + first, start + last)

    def sample(self) -> Floats:
        """The rows that scales are compared on."""
        return np.concatenate(list(self.slabs(SAMPLE)))

    def error(self, rows: Floats, scales: NDArray[np.float64]) -> float:
        """The loss of ``rows`` with ``scales`` on their columns; infinite if they do not fit."""
        factors = scales.astype(np.float32)
        importance = None
        if self.weighted:
            importance = np.asarray(self.squares / factors**2, np.float32)
        try:
            difference = self.grid(rows * factors, importance) / factors - rows
        except native.UnencodableError:
            return math.inf
        if self.pivots is None:
            return output_error(difference, self.hessian)
        return float(np.square(difference).sum(axis=0, dtype=np.float64) @ self.squares)

    def output(self, rows: Floats) -> float:
        """Output energy tr(W H W^T) of the matrix, estimated from a sample of rows."""
        return output_error(rows, self.hessian) * self.height / len(rows)


def open_consumers(
    model: Model,
    group: FoldGroup,
    matrix: int,
    measured: InputStatistics,
    grids: Mapping[str, RoundRows],
    *,
    weighted: bool,
    feedback: bool = False,
) -> list[ConsumerMatrix]:
    """The matrices that read the group's channels, will be rounded and saw an input.

    Where the group's matrices have channels of their own (inside experts), those of ``matrix``.
    Matrices without a grid stay as they are, so their error is nothing. ``feedback`` says that
    rounding will feed errors back.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    counts = {}
    for name in group.consumers:
        if name in grids:
            tensor = tensors[name]
            stack = tensor.matrices
            for number in range(stack) if group.matrices == 1 else (matrix,):
                counts[name, number] = measured.count(name, number)
    most = max(counts.values(), default=0)
    load = lru_cache(maxsize=2)(measured.hessian)
    pivots = None
    if feedback:
        pivots = lru_cache(maxsize=None)(lambda name, number: _pivots(load(name, number)))
    return [
        ConsumerMatrix(
            model, tensors[name], number, load, grids[name], count / most, weighted, pivots
        )
        for (name, number), count in counts.items()
        if count
    ]


def _pivots(hessian: Floats) -> Floats:
    return prepare_hessian(hessian).pivots
