"""GPTQ in a block format on a device: `quantcli.rounding.block_feedback` on tensors.

What the host does is find scales: the weights of a column block as feedback has left them go to
the format's own encoder, and its blocks come back. That is an eighth of what one product with the
Hessian moves within the device, and an encoder of eight or sixteen threads finds them sooner than a
search of hundreds of small operations would.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.codebook_lattice import CODEBOOKS, CodebookLattice
from quantcli.formats.lattice import LATTICES, Lattice
from quantcli.rounding.device.parts import (
    TensorCodebook,
    TensorParts,
    TensorScalarCodebook,
    TensorVectorCodebook,
)
from quantcli.rounding.device.scalar_kernels import Scales
from quantcli.rounding.encoded_columns import encode_columns
from quantcli.rounding.packed_matrix import KERNEL_COLUMNS
from quantcli.rounding.scalar_codebook import ScalarCodebook
from quantcli.rounding.vector_codebook import VectorCodebook
from quantcli.statistics.device_hessian import TensorHessian
from quantcli.workers import Workers


def open_codebook(fmt: BlockFormat, device: torch.device) -> TensorCodebook:
    """What a format's codes stand for, on a device."""
    if fmt.name in CODEBOOKS:
        return TensorVectorCodebook.of(VectorCodebook.of(CODEBOOKS[fmt.name]), device)
    return TensorScalarCodebook.of(ScalarCodebook.of(LATTICES[fmt.name]), device)


class TensorMatrix:
    """`quantcli.rounding.packed_matrix.PackedMatrix` on a device."""

    def __init__(self, fmt: BlockFormat, grid: TensorCodebook, rows: torch.Tensor) -> None:
        self.format, self.grid, self.rows = fmt, grid, rows
        self.errors = torch.zeros_like(rows)
        count = rows.shape[1]
        self.columns = [
            slice(i, min(i + KERNEL_COLUMNS, count)) for i in range(0, count, KERNEL_COLUMNS)
        ]
        self.parts: list[TensorParts] = []

    def set_parts(self, index: int, parts: TensorParts) -> None:
        """Set a column block, the next one or one that was set, and the errors of its columns."""
        columns = self.columns[index]
        self.parts[index : index + 1] = [parts]
        self.errors[:, columns] = self.rows[:, columns] - self.grid.values(parts)

    def find_parts(
        self, target: torch.Tensor, importance: Floats | None, pool: Workers
    ) -> TensorParts:
        """The encoder's own parts of ``target`` (n, columns of a block)."""
        packed = encode_columns(self.format, target.cpu().numpy(), importance, pool)
        blocks = packed.reshape(-1, self.format.nbytes)
        return self.grid.load(_lattice(self.format).split(blocks), len(target))

    def keep_unscaled(self, parts: TensorParts, codes: torch.Tensor) -> torch.Tensor:
        """``codes``, but where a scale is zero, where a code says nothing, those of ``parts``."""
        steps, _ = parts.held.steps()
        unscaled = (steps == 0).repeat_interleave(self.grid.sub // self.grid.group, dim=1)
        return torch.where(unscaled, parts.codes, codes)

    def pack(self) -> Bytes:
        """The packed rows, uint8 of shape (n, row bytes)."""
        lattice = _lattice(self.format)
        joined = [lattice.join(self.grid.unload(parts)) for parts in self.parts]
        return np.concatenate([part.reshape(len(self.rows), -1) for part in joined], axis=1)


def _lattice(fmt: BlockFormat) -> Lattice | CodebookLattice:
    return CODEBOOKS[fmt.name] if fmt.name in CODEBOOKS else LATTICES[fmt.name]


def round_blocks(
    matrix: TensorMatrix, hessian: TensorHessian, importance: Floats | None, pool: Workers,
    block_sweeps: int,
) -> None:  # fmt: skip
    """Round a matrix in the order of ``hessian``; `block_feedback.round_with_feedback`."""
    ordered = hessian.keep_together(matrix.grid.together)
    if ordered.order is None:
        _round_in_order(matrix, ordered, importance, pool, block_sweeps)
    else:
        _round_sorted(matrix, ordered, ordered.order, importance, pool)


def sweep_blocks(matrix: TensorMatrix, hessian: TensorHessian) -> None:
    """One sweep over all of a matrix; `quantcli.rounding.descent.sweep`."""
    for index, columns in enumerate(matrix.columns):
        gradient = matrix.errors @ hessian.matrix[:, columns]
        own = hessian.own(columns)
        matrix.set_parts(index, matrix.grid.sweep(matrix.parts[index], own, gradient))


def retarget(matrix: TensorMatrix, rows: torch.Tensor) -> TensorMatrix:
    """The matrix's codes as an approximation of other ``rows``."""
    found = TensorMatrix(matrix.format, matrix.grid, rows)
    for index, parts in enumerate(matrix.parts):
        found.set_parts(index, parts)
    return found


def _round_in_order(
    matrix: TensorMatrix, hessian: TensorHessian, importance: Floats | None, pool: Workers,
    block_sweeps: int,
) -> None:  # fmt: skip
    grid, errors = matrix.grid, matrix.errors
    for index, columns in enumerate(matrix.columns):
        first = columns.start
        weights = matrix.rows[:, columns]
        target = weights + errors[:, :first] @ hessian.factor[:first, columns]
        important = None if importance is None else importance[columns]
        parts = matrix.find_parts(target, important, pool)
        found = grid.round_columns(parts, target, weights, hessian, columns)
        codes = matrix.keep_unscaled(TensorParts(parts.codes, found.held), found.codes)
        matrix.set_parts(index, TensorParts(codes, found.held))
        if block_sweeps == 0:
            continue
        metric, pull = hessian.metric(columns, columns.stop - first), target - weights
        factor, pivots = hessian.part(columns), hessian.pivots[columns]
        for _ in range(block_sweeps):
            missed = pull + errors[:, columns] @ factor
            gradient = (missed * pivots) @ factor.T
            matrix.set_parts(index, grid.sweep(matrix.parts[index], metric, gradient))


def _round_sorted(
    matrix: TensorMatrix, hessian: TensorHessian, order: torch.Tensor, importance: Floats | None,
    pool: Workers,
) -> None:  # fmt: skip
    rows, grid = matrix.rows, matrix.grid
    found = [
        matrix.find_parts(
            rows[:, columns], None if importance is None else importance[columns], pool
        )
        for columns in matrix.columns
    ]
    steps, lows = (torch.cat(part, 1) for part in _both(found))
    shape = len(rows), rows.shape[1] // grid.group
    codes = torch.empty(shape, dtype=found[0].codes.dtype, device=rows.device)
    errors = torch.zeros_like(rows)
    for start in range(0, rows.shape[1], KERNEL_COLUMNS):
        chunk = slice(start, min(start + KERNEL_COLUMNS, rows.shape[1]))
        chosen = order[chunk]
        weights = rows[:, chosen]
        target = weights + errors[:, :start] @ hessian.factor[:start, chunk]
        runs = chosen[:: grid.together] // grid.sub
        own = grid.feed_back(
            grid.together, target, weights, hessian, chunk, steps[:, runs], lows[:, runs]
        )
        codes[:, chosen[:: grid.group] // grid.group], errors[:, chunk] = own
    for index, columns in enumerate(matrix.columns):
        groups = slice(columns.start // grid.group, columns.stop // grid.group)
        kept = matrix.keep_unscaled(found[index], codes[:, groups])
        matrix.set_parts(index, TensorParts(kept, found[index].held))


def _both(found: Sequence[TensorParts]) -> list[list[torch.Tensor]]:
    """The steps of all, and their minimums."""
    pairs: list[Scales] = [parts.held for parts in found]
    return [[held.steps()[i] for held in pairs] for i in (0, 1)]
