"""GPTQ on a grid of integers or small floats: error feedback, then descent on codes and scales.

Where at least one whole group fits into 256 columns, each group's range is found in the weights as
the feedback so far has changed them, and codes and scales are swept before the next columns are
rounded, under the Schur-complement metric (the error that these cannot compensate). A longer group,
a whole row or a whole matrix has its scale from the untouched weights, and so has every group whose
columns are taken out of order. Sweeps of coordinate descent follow: every code to its best given
all others, then every scale (and edge) to its least squares under the Hessian, rounded to the dtype
that is stored and taken only where the loss falls. Zero points that are whole numbers stay as they
were found.

Source: as in `quantcli.rounding.block_feedback`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Floats
from quantcli.formats.float_grid import BLOCK
from quantcli.formats.integer import Codes, GridCodes
from quantcli.layouts.base import CodeGrid
from quantcli.rounding.column_blocks import RUN, ColumnBlock, cut_column_blocks
from quantcli.rounding.kernels import ScalarKernels
from quantcli.rounding.options import Options
from quantcli.rounding.packed_matrix import KERNEL_COLUMNS
from quantcli.statistics.hessian import ColumnOrder, Hessian, HessianBlock
from quantcli.workers import Workers

Zeros = NDArray[Any]


def find_ranges(
    rows: Floats, grid: CodeGrid, importance: Floats | None, pool: Workers
) -> tuple[Floats, Zeros | None]:
    """Scales and zeros of least squared error, each (rows, groups); all equal for "tensor"."""
    count = len(rows)
    if grid.strategy == "block":
        return grid.fit(rows, importance, "mse")
    if grid.strategy == "tensor":
        scale, zero = grid.fit_tensor(lambda: [rows], importance, "mse")
        return np.repeat(scale, count, 0), None if zero is None else np.repeat(zero, count, 0)
    scales = np.empty((count, grid.groups(rows.shape[1])), np.float32)
    zeros: Zeros | None = None
    if not grid.symmetric:
        zeros = np.empty(scales.shape, np.float32 if grid.zero == "edge" else np.int32)

    def share(start: int, stop: int) -> None:
        found = grid.fit(rows[start:stop], importance, "mse")
        scales[start:stop] = found[0]
        if zeros is not None and found[1] is not None:
            zeros[start:stop] = found[1]

    pool.run(count, share)
    return scales, zeros


def round_on_grid(
    rows: Floats, grid: CodeGrid, hessian: Hessian, importance: Floats | None, pool: Workers,
    options: Options,
) -> GridCodes:  # fmt: skip
    """Codes of ``rows`` (n, columns), float32, in the order of ``hessian``, after the sweeps.

    ``importance`` has a weight for each column, for the search for ranges. Scales and zeros have
    a row for each row of the matrix; for strategy "tensor" all are equal.
    """
    work = _Work.of(rows, grid, hessian, pool)
    if hessian.order is not None:
        _round_sorted(work, hessian.order, importance)
    else:
        _round_in_order(work, importance, options.block_sweeps)
    for _ in range(options.sweeps_after(hessian)):
        _sweep(work)
    return work.result()


def refine_on_grid(
    coded: GridCodes, rows: Floats, grid: CodeGrid, hessian: Hessian, pool: Workers
) -> GridCodes:
    """A sweep over codes, then scales and edges, from ``coded`` towards ``rows`` (n, columns)."""
    work = _Work.of(rows, grid, hessian, pool)
    work.codes[:], work.scales[:] = grid.to_ranks(coded.codes), work.refine(coded.scales)
    if work.zeros is not None and coded.zeros is not None:
        work.zeros[:] = coded.zeros
    for block in work.blocks:
        work.update_errors(block.columns)
    _sweep(work)
    return work.result()


@dataclass
class _Work:
    """A matrix being rounded: the codes chosen so far, and ``errors``, weights less values.

    ``codes`` are places in the grid's levels. Scales are those of ``group`` columns each; where a
    block's columns are no multiple of 128 several groups have one.
    """

    rows: Floats
    grid: CodeGrid
    hessian: Hessian
    pool: Workers
    kernels: ScalarKernels
    group: int
    blocks: list[ColumnBlock]
    codes: Codes
    scales: Floats
    zeros: Zeros | None
    errors: Floats

    @classmethod
    def of(cls, rows: Floats, grid: CodeGrid, hessian: Hessian, pool: Workers) -> _Work:
        count, columns = rows.shape
        group = columns // grid.groups(columns)
        if grid.strategy == "block":
            group = gcd(BLOCK, columns)
        groups = columns // group
        kernels = ScalarKernels(grid.levels, grid.uniform, RUN)
        zeros: Zeros | None = None
        if not grid.symmetric:
            kind = np.float32 if grid.zero == "edge" else np.int32
            zeros = np.zeros((count, groups), kind)
        return cls(
            rows, grid, hessian, pool, kernels, group, cut_column_blocks(columns, group),
            np.zeros(rows.shape, np.uint8), np.ones((count, groups), np.float32), zeros,
            np.zeros_like(rows),
        )  # fmt: skip

    @property
    def lows(self) -> Floats:
        """A value is scale * code - low; (n, groups)."""
        if self.zeros is None:
            return self.scales * np.float32(self.grid.offset)
        if self.grid.zero == "edge":
            return np.negative(self.zeros, dtype=np.float32)
        return self.scales * self.zeros.astype(np.float32)

    def update_errors(self, columns: slice) -> None:
        """Set the errors of ``columns``, part of one group or whole groups, from their codes."""
        first = columns.start // self.group
        last = -(-columns.stop // self.group)
        zeros = None if self.zeros is None else self.zeros[:, first:last]
        codes = self.grid.to_codes(self.codes[:, columns])
        if self.grid.strategy == "block":
            values = self.grid.levels[self.codes[:, columns]].reshape(len(codes), last - first, -1)
            decoded = (values * self.scales[:, first:last, None]).reshape(codes.shape)
        else:
            decoded = self.grid.dequantize(GridCodes(codes, self.scales[:, first:last], zeros))
        np.subtract(self.rows[:, columns], decoded, out=self.errors[:, columns])

    def start(self, importance: Floats | None) -> None:
        """Set scales and zeros to those of the untouched weights."""
        scales, self.zeros = find_ranges(self.rows, self.grid, importance, self.pool)
        self.scales = self.refine(scales)

    def refine(self, scales: Floats) -> Floats:
        """A grid's scales as those of ``group`` columns each."""
        if self.grid.strategy != "block":
            return scales
        spread = np.repeat(scales, BLOCK // self.group, axis=1)
        return np.ascontiguousarray(spread[:, : self.scales.shape[1]])

    def result(self) -> GridCodes:
        """The codes and scales as the grid has them."""
        step = BLOCK // self.group if self.grid.strategy == "block" else 1
        scales = np.ascontiguousarray(self.scales[:, ::step])
        return GridCodes(self.grid.to_codes(self.codes), scales, self.zeros, self.grid.whole)


class _Measure(Protocol):
    """A quadratic loss of the errors of some columns."""

    def curvature(self, columns: slice) -> Floats:
        """Its matrix, for some of them."""

    def slope(self, columns: slice) -> Floats:
        """Half of what the loss falls by with each of their errors (n, columns)."""


@dataclass(frozen=True)
class _Whole:
    """The Hessian, with all other columns as they are."""

    work: _Work

    def curvature(self, columns: slice) -> Floats:
        return self.work.hessian.own(columns)

    def slope(self, columns: slice) -> Floats:
        return self.work.hessian.slope(self.work.errors, columns)


@dataclass(frozen=True)
class _Ahead:
    """The error that columns after those of ``part``, which begin at ``first``, cannot compensate.

    ``pull`` is what the columns before them ask of each of them.
    """

    work: _Work
    part: HessianBlock
    first: int
    pull: Floats

    def _own(self, columns: slice) -> slice:
        return slice(columns.start - self.first, columns.stop - self.first)

    def curvature(self, columns: slice) -> Floats:
        own = self._own(columns)
        return self.part.metric(len(self.part.pivots))[own, own]

    def slope(self, columns: slice) -> Floats:
        every = slice(self.first, self.first + len(self.part.pivots))
        missed = self.pull + self.work.errors[:, every] @ self.part.factor
        return (missed * self.part.pivots) @ self.part.factor[self._own(columns)].T


def _round_in_order(work: _Work, importance: Floats | None, block_sweeps: int) -> None:
    moving = work.grid.strategy == "group" and work.group <= KERNEL_COLUMNS
    if not moving:
        work.start(importance)
    for block in work.blocks:
        columns, first = block.columns, block.columns.start
        weights = work.rows[:, columns]
        target = weights + work.hessian.ahead(work.errors, columns)
        if moving:
            important = None if importance is None else importance[columns]
            scales, zeros = find_ranges(target, work.grid, important, work.pool)
            work.scales[:, block.groups] = scales
            if work.zeros is not None:
                work.zeros[:, block.groups] = zeros
        part = work.hessian.part(columns)
        codes, _ = work.kernels.feedback(
            RUN, block.widen(target), block.widen(weights), block.widen_square(part.factor),
            block.widen_groups(work.scales, 1), block.widen_groups(work.lows, 0), work.pool,
        )  # fmt: skip
        work.codes[:, columns] = codes[:, block.places]
        work.update_errors(columns)
        ahead = _Ahead(work, part, first, target - weights)
        for _ in range(block_sweeps):
            _sweep_codes(work, block, ahead)
            if moving:
                _refit(work, block.groups, ahead)


def _round_sorted(work: _Work, order: ColumnOrder, importance: Floats | None) -> None:
    work.start(importance)
    lows, columns = work.lows, work.rows.shape[1]
    errors = np.zeros_like(work.rows)
    for start in range(0, columns, KERNEL_COLUMNS):
        chunk = slice(start, min(start + KERNEL_COLUMNS, columns))
        chosen = order[chunk]
        block = cut_column_blocks(len(chosen), len(chosen))[0]
        weights = work.rows[:, chosen]
        target = weights + work.hessian.ahead(errors, chunk)
        codes, missed = work.kernels.feedback(
            1, block.widen(target), block.widen(weights),
            block.widen_square(work.hessian.part(chunk).factor),
            block.widen(work.scales[:, chosen // work.group], 1),
            block.widen(lows[:, chosen // work.group]), work.pool,
        )  # fmt: skip
        work.codes[:, chosen] = codes[:, block.places]
        errors[:, chunk] = missed[:, block.places]
    for block in work.blocks:
        work.update_errors(block.columns)


def _sweep(work: _Work) -> None:
    """Every code, then every scale and edge, to the best given all others."""
    measure = _Whole(work)
    for block in work.blocks:
        _sweep_codes(work, block, measure)
    _refit(work, slice(0, work.scales.shape[1]), measure)


def _sweep_codes(work: _Work, block: ColumnBlock, measure: _Measure) -> None:
    """Every code of the block to the best given all others, from left to right."""
    columns, count = block.columns, len(work.rows)
    own = block.widen_square(measure.curvature(columns))
    gradient = block.widen(measure.slope(columns))
    codes = block.widen(work.codes[:, columns])
    steps, lows = block.widen_groups(work.scales, 1), block.widen_groups(work.lows, 0)
    ones = np.ones((count, 1), np.float32)
    work.kernels.sweep(
        own, gradient, codes, ones, steps, ones, lows, work.pool, change_scales=False
    )
    work.codes[:, columns] = codes[:, block.places]
    work.update_errors(columns)


def _refit(work: _Work, groups: slice, measure: _Measure) -> None:
    """Every scale, then every edge, to its optimum, group after group.

    Not those of blocks, nor one that other matrices may share.
    """
    if work.grid.strategy == "block" or (work.grid.strategy == "tensor" and work.grid.whole):
        return
    for number in range(groups.start, groups.stop):
        columns = slice(number * work.group, (number + 1) * work.group)
        along = work.grid.levels[work.codes[:, columns]]
        if work.zeros is None:
            along -= np.float32(work.grid.offset)
        elif work.grid.zero == "integer":
            along -= work.zeros[:, number, None].astype(np.float32)
        work.scales[:, number] = _improve(work, columns, along, work.scales[:, number], measure)
        work.update_errors(columns)
        if work.zeros is not None and work.grid.zero == "edge":
            ones = np.ones_like(along)
            work.zeros[:, number] = _improve(work, columns, ones, work.zeros[:, number], measure)
            work.update_errors(columns)


def _improve(work: _Work, columns: slice, along: Floats, now: Floats, measure: _Measure) -> Floats:
    """``now`` (n,), moved to the least loss for values that change by ``along`` with it."""
    slope = np.einsum("ij,ij->i", along, measure.slope(columns), dtype=np.float64)
    curvature = np.einsum("ij,ij->i", along, along @ measure.curvature(columns), dtype=np.float64)
    if work.grid.strategy == "tensor":
        slope, curvature = (np.broadcast_to(part.sum(), part.shape) for part in (slope, curvature))
    wanted = now + np.divide(slope, curvature, out=np.zeros(len(now)), where=curvature > 0)
    stored = work.grid.store(wanted.astype(np.float32))
    moved = stored.astype(np.float64) - now
    with np.errstate(invalid="ignore"):
        better = (2 * moved * slope - moved * moved * curvature > 0) & (stored * now > 0)
    return np.where(better, stored, now)
