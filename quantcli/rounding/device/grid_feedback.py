"""GPTQ on a model folder's grid on a device: `quantcli.rounding.grid_feedback` on tensors.

Ranges, and scales as the target stores them, are found by the grid itself on the host. Columns need
no filling here, since nothing asks for whole runs of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Protocol

import numpy as np
import torch

from quantcli.formats.base import Floats
from quantcli.formats.float_grid import BLOCK
from quantcli.formats.integer import GridCodes
from quantcli.layerwise.devices import widest
from quantcli.layouts.base import CodeGrid
from quantcli.rounding.column_blocks import RUN, ColumnBlock, cut_column_blocks
from quantcli.rounding.device.scalar_kernels import TensorScalarKernels
from quantcli.rounding.grid_feedback import Zeros, find_ranges
from quantcli.rounding.kernels import ScalarKernels
from quantcli.rounding.packed_matrix import KERNEL_COLUMNS
from quantcli.statistics.device_hessian import TensorHessian
from quantcli.workers import Workers


@dataclass
class GridWork:
    """A matrix being rounded: the places of codes in the grid's levels, and ``errors``.

    Scales and zeros (float32, whole numbers where the grid's are) are those of ``group`` columns.
    """

    rows: torch.Tensor
    grid: CodeGrid
    hessian: TensorHessian
    pool: Workers
    kernels: TensorScalarKernels
    group: int
    blocks: list[ColumnBlock]
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    errors: torch.Tensor

    @classmethod
    def of(
        cls, rows: torch.Tensor, grid: CodeGrid, hessian: TensorHessian, pool: Workers
    ) -> GridWork:
        """Nothing chosen yet."""
        count, columns = rows.shape
        group = gcd(BLOCK, columns) if grid.strategy == "block" else columns // grid.groups(columns)
        native = ScalarKernels(grid.levels, grid.uniform, RUN)
        scales = rows.new_ones((count, columns // group))
        return cls(
            rows, grid, hessian, pool, TensorScalarKernels.of(native, rows.device), group,
            cut_column_blocks(columns, group), torch.zeros_like(rows, dtype=torch.uint8), scales,
            None if grid.symmetric else torch.zeros_like(scales), torch.zeros_like(rows),
        )  # fmt: skip

    @property
    def lows(self) -> torch.Tensor:
        """A value is scale * code - low; (n, groups)."""
        if self.zeros is None:
            return self.scales * self.grid.offset
        return -self.zeros if self.grid.zero == "edge" else self.scales * self.zeros

    def run(self, columns: slice) -> int:
        """How many of some columns, one group's or whole groups, have one scale."""
        return int(min(self.group, columns.stop - columns.start))

    def groups(self, columns: slice) -> slice:
        """The groups that some columns are in."""
        return slice(columns.start // self.group, -(-columns.stop // self.group))

    def update_errors(self, columns: slice) -> None:
        """Set the errors of ``columns``, part of one group or whole groups, from their codes."""
        self.errors[:, columns] = self.rows[:, columns] - self.values(columns)

    def values(self, columns: slice) -> torch.Tensor:
        """What the codes of such columns stand for, (n, columns)."""
        own, run = self.groups(columns), self.run(columns)
        levels = self.kernels.levels.values[self.codes[:, columns].long()]
        scales = self.scales[:, own].repeat_interleave(run, dim=1)
        if self.zeros is None:
            return (levels - self.grid.offset) * scales
        zeros = self.zeros[:, own].repeat_interleave(run, dim=1)
        edge = self.grid.zero == "edge"
        return levels * scales + zeros if edge else (levels - zeros) * scales

    def find_ranges(
        self, target: torch.Tensor, importance: Floats | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The grid's own scales and zeros of some columns."""
        rows = np.ascontiguousarray(target.cpu().numpy())
        scales, zeros = find_ranges(rows, self.grid, importance, self.pool)
        return self._send(scales), None if zeros is None else self._send(zeros)

    def start(self, importance: Floats | None) -> None:
        """Set scales and zeros to those of the untouched weights."""
        scales, self.zeros = self.find_ranges(self.rows, importance)
        if self.grid.strategy == "block":
            spread = scales.repeat_interleave(BLOCK // self.group, dim=1)
            scales = spread[:, : self.scales.shape[1]].contiguous()
        self.scales = scales

    def store(self, wanted: torch.Tensor) -> torch.Tensor:
        """Scales as the target stores them."""
        return self._send(self.grid.store(wanted.cpu().numpy()))

    def result(self) -> GridCodes:
        """The codes and scales as the grid has them, on the host."""
        step = BLOCK // self.group if self.grid.strategy == "block" else 1
        zeros: Zeros | None = None
        if self.zeros is not None:
            kind = np.float32 if self.grid.zero == "edge" else np.int32
            zeros = self.zeros.cpu().numpy().astype(kind)
        scales = np.ascontiguousarray(self.scales.cpu().numpy()[:, ::step])
        codes = self.grid.to_codes(self.codes.cpu().numpy())
        return GridCodes(codes, scales, zeros, self.grid.whole)

    def retarget(self, rows: torch.Tensor) -> GridWork:
        """The same codes as an approximation of other ``rows``."""
        zeros = None if self.zeros is None else self.zeros.clone()
        found = GridWork(
            rows, self.grid, self.hessian, self.pool, self.kernels, self.group, self.blocks,
            self.codes.clone(), self.scales.clone(), zeros, torch.zeros_like(rows),
        )  # fmt: skip
        for block in self.blocks:
            found.update_errors(block.columns)
        return found

    def _send(self, values: Zeros) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.rows.device)


class _Measure(Protocol):
    """A quadratic loss of the errors of some columns; see `quantcli.rounding.grid_feedback`."""

    def curvature(self, columns: slice) -> torch.Tensor:
        """Its matrix, for some of them."""

    def slope(self, columns: slice) -> torch.Tensor:
        """Half of what the loss falls by with each of their errors (n, columns)."""


@dataclass(frozen=True)
class _Whole:
    work: GridWork

    def curvature(self, columns: slice) -> torch.Tensor:
        return self.work.hessian.matrix[columns, columns]

    def slope(self, columns: slice) -> torch.Tensor:
        return self.work.errors @ self.work.hessian.matrix[:, columns]


@dataclass(frozen=True)
class _Ahead:
    work: GridWork
    every: slice
    pull: torch.Tensor

    def _own(self, columns: slice) -> slice:
        return slice(columns.start - self.every.start, columns.stop - self.every.start)

    def curvature(self, columns: slice) -> torch.Tensor:
        own = self._own(columns)
        width = self.every.stop - self.every.start
        return self.work.hessian.metric(self.every, width)[own, own]

    def slope(self, columns: slice) -> torch.Tensor:
        factor, pivots = self.work.hessian.part(self.every), self.work.hessian.pivots[self.every]
        missed = self.pull + self.work.errors[:, self.every] @ factor
        return (missed * pivots) @ factor[self._own(columns)].T


def round_grid(work: GridWork, importance: Floats | None, block_sweeps: int) -> None:
    """Codes in the order of the Hessian; `grid_feedback.round_on_grid` but for its last sweeps."""
    if work.hessian.order is None:
        _round_in_order(work, importance, block_sweeps)
    else:
        _round_sorted(work, work.hessian.order, importance)


def sweep_grid(work: GridWork) -> None:
    """Every code, then every scale and edge, to the best given all others."""
    measure = _Whole(work)
    for block in work.blocks:
        _sweep_codes(work, block.columns, measure)
    _refit(work, slice(0, work.scales.shape[1]), measure)


def _round_in_order(work: GridWork, importance: Floats | None, block_sweeps: int) -> None:
    hessian = work.hessian
    moving = work.grid.strategy == "group" and work.group <= KERNEL_COLUMNS
    if not moving:
        work.start(importance)
    for block in work.blocks:
        columns, first = block.columns, block.columns.start
        weights = work.rows[:, columns]
        target = weights + work.errors[:, :first] @ hessian.factor[:first, columns]
        if moving:
            important = None if importance is None else importance[columns]
            scales, zeros = work.find_ranges(target, important)
            work.scales[:, block.groups] = scales
            if work.zeros is not None and zeros is not None:
                work.zeros[:, block.groups] = zeros
        own = work.groups(columns)
        work.codes[:, columns], _ = work.kernels.feedback(
            work.run(columns), target, weights, hessian.part(columns), work.scales[:, own],
            work.lows[:, own],
        )  # fmt: skip
        work.update_errors(columns)
        ahead = _Ahead(work, columns, target - weights)
        for _ in range(block_sweeps):
            _sweep_codes(work, columns, ahead)
            if moving:
                _refit(work, block.groups, ahead)


def _round_sorted(work: GridWork, order: torch.Tensor, importance: Floats | None) -> None:
    work.start(importance)
    lows, hessian, columns = work.lows, work.hessian, work.rows.shape[1]
    errors = torch.zeros_like(work.rows)
    for start in range(0, columns, KERNEL_COLUMNS):
        chunk = slice(start, min(start + KERNEL_COLUMNS, columns))
        chosen = order[chunk]
        weights = work.rows[:, chosen]
        target = weights + errors[:, :start] @ hessian.factor[:start, chunk]
        groups = chosen // work.group
        work.codes[:, chosen], errors[:, chunk] = work.kernels.feedback(
            1, target, weights, hessian.part(chunk), work.scales[:, groups], lows[:, groups]
        )
    for block in work.blocks:
        work.update_errors(block.columns)


def _sweep_codes(work: GridWork, columns: slice, measure: _Measure) -> None:
    own = work.groups(columns)
    codes, _ = work.kernels.sweep_codes(
        work.run(columns), measure.curvature(columns).contiguous(), measure.slope(columns),
        work.codes[:, columns], work.scales[:, own], work.lows[:, own],
    )  # fmt: skip
    work.codes[:, columns] = codes.T
    work.update_errors(columns)


def _refit(work: GridWork, groups: slice, measure: _Measure) -> None:
    """Every scale, then every edge, to its optimum; `grid_feedback._refit`."""
    grid = work.grid
    if grid.strategy == "block" or (grid.strategy == "tensor" and grid.whole):
        return
    for number in range(groups.start, groups.stop):
        columns = slice(number * work.group, (number + 1) * work.group)
        along = work.kernels.levels.values[work.codes[:, columns].long()]
        if work.zeros is None:
            along = along - grid.offset
        elif grid.zero == "integer":
            along = along - work.zeros[:, number, None]
        work.scales[:, number] = _improve(work, columns, along, work.scales[:, number], measure)
        work.update_errors(columns)
        if work.zeros is not None and grid.zero == "edge":
            ones = torch.ones_like(along)
            work.zeros[:, number] = _improve(work, columns, ones, work.zeros[:, number], measure)
            work.update_errors(columns)


def _improve(
    work: GridWork, columns: slice, along: torch.Tensor, now: torch.Tensor, measure: _Measure
) -> torch.Tensor:
    """``now`` (n,), moved to the least loss for values that change by ``along`` with it."""
    wide = widest(now.device)
    slope = (along.to(wide) * measure.slope(columns).to(wide)).sum(1)
    bent = along @ measure.curvature(columns)
    curvature = (along.to(wide) * bent.to(wide)).sum(1)
    if work.grid.strategy == "tensor":
        slope, curvature = (part.sum().expand(part.shape) for part in (slope, curvature))
    wanted = now + torch.where(curvature > 0, slope / curvature, 0)
    stored = work.store(wanted.float())
    moved = stored.to(wide) - now
    better = (2 * moved * slope - moved * moved * curvature > 0) & (stored * now > 0)
    return torch.where(better, stored, now)
