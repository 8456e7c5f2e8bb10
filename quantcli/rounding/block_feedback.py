"""GPTQ in a block format: round column by column, and compensate each error in later columns.

At the start of each 256 columns the scales are those that the format's encoder finds, importance
and all, in the weights as the feedback so far has changed them; under these the columns are rounded
in order, each error passed on to the columns after it; a group that is one point of a codebook is
rounded at once. Then the 256 columns are swept: every code and scale goes to its best given the
others, under the Schur-complement metric (the error that later columns cannot compensate). A
Hessian in another order (largest mean square first, when most columns are left to make up for the
error) has the scales taken from the untouched weights, and no such sweeps.

Sources: GPTQ (arXiv:2210.17323); QuIP (arXiv:2307.13304) for the shape of the feedback; the choice
of both scale levels from compensated weights follows the GPTQ of DASLab's gptq-gguf-toolkit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from quantcli.formats.base import BlockFormat, Floats
from quantcli.formats.lattice import Parts
from quantcli.layerwise.products import SHARE, multiply, shares
from quantcli.layerwise.steady import run_tasks
from quantcli.rounding.encoded_columns import encode_columns
from quantcli.rounding.packed_matrix import PackedMatrix
from quantcli.statistics.hessian import ColumnOrder, Hessian, HessianBlock
from quantcli.workers import Workers

_CHUNK = 256
"""Columns that are rounded at once where they are taken out of order."""


def round_with_feedback(
    fmt: BlockFormat, rows: Floats, hessian: Hessian, importance: Floats | None, pool: Workers,
    block_sweeps: int = 0,
) -> PackedMatrix:  # fmt: skip
    """Round ``rows`` (n, columns), float32, in the order of ``hessian``.

    ``importance`` has a weight for each column, for the encoder's search for scales;
    ``block_sweeps`` sweeps go over each 256 columns, and with none this is GPTQ as published.
    """
    matrix = PackedMatrix(fmt, rows)
    ordered = hessian.keep_together(matrix.grid.together)
    if ordered.order is None:
        _round_in_order(matrix, ordered, importance, block_sweeps)
    else:
        _round_sorted(matrix, ordered, ordered.order, importance, pool)
    return matrix


def _find_parts(
    matrix: PackedMatrix, target: Floats, columns: slice, importance: Floats | None, pool: Workers
) -> Parts:
    important = None if importance is None else importance[columns]
    return matrix.split(encode_columns(matrix.format, target, important, pool))


@dataclass(frozen=True, eq=False)
class BlockRounding:
    """How rows of one column block are rounded, whichever thread does it."""

    matrix: PackedMatrix
    columns: slice
    part: HessianBlock
    importance: Floats | None
    sweeps: int
    metric: Floats | None

    @classmethod
    def of(
        cls, matrix: PackedMatrix, index: int, hessian: Hessian, importance: Floats | None,
        sweeps: int,
    ) -> BlockRounding:  # fmt: skip
        """Of column block ``index``, for ``sweeps`` sweeps over it."""
        columns = matrix.columns[index]
        part = hessian.part(columns)
        # Now, and not by whichever thread is first.
        part.metric(matrix.grid.width)
        metric = part.metric(columns.stop - columns.start) if sweeps else None
        return cls(matrix, columns, part, importance, sweeps, metric)

    def round(self, weights: Floats, pull: Floats) -> tuple[Parts, Floats]:
        """Parts of some rows, and their errors, towards ``weights``.

        ``pull`` is what the columns before ask of these. Shapes (n, columns).
        """
        matrix, part, alone, count = self.matrix, self.part, Workers(), len(weights)
        target = weights + pull
        parts = _find_parts(matrix, target, self.columns, self.importance, alone)
        parts, codes = matrix.grid.round_columns(parts, target, weights, part, alone)
        parts = matrix.choose(parts, codes)
        errors = weights - matrix.values(parts, count)
        if self.metric is None:
            return parts, errors
        pull = target - weights
        for _ in range(self.sweeps):
            missed = pull + multiply(errors, part.factor)
            gradient = multiply(missed * part.pivots, part.factor.T)
            parts = matrix.grid.sweep(parts, self.metric, gradient, alone)
            errors = weights - matrix.values(parts, count)
        return parts, errors


def _round_in_order(
    matrix: PackedMatrix, hessian: Hessian, importance: Floats | None, block_sweeps: int
) -> None:
    def share(index: int, block: BlockRounding, pull: Floats, rows: slice) -> None:
        weights = matrix.weights(block.columns, rows)
        matrix.set_parts(index, *_placed(block.round(weights, pull[rows]), rows))

    for index, columns in enumerate(matrix.columns):
        block = BlockRounding.of(matrix, index, hessian, importance, block_sweeps)
        pull = hessian.ahead(matrix.errors, columns)
        run_tasks(
            [partial(share, index, block, pull, rows) for rows in shares(matrix.count, SHARE)]
        )


def _placed(found: tuple[Parts, Floats], rows: slice) -> tuple[Parts, slice, Floats]:
    return found[0], rows, found[1]


def _round_sorted(
    matrix: PackedMatrix,
    hessian: Hessian,
    order: ColumnOrder,
    importance: Floats | None,
    pool: Workers,
) -> None:
    rows, sub, grid = matrix.rows, matrix.lattice.sub, matrix.grid
    found = [
        _find_parts(matrix, np.ascontiguousarray(rows[:, columns]), columns, importance, pool)
        for columns in matrix.columns
    ]
    both = [matrix.steps(parts) for parts in found]
    steps, lows = (np.concatenate(part, axis=1) for part in zip(*both, strict=True))
    codes = np.empty((len(rows), rows.shape[1] // grid.group), np.int32)
    errors = np.zeros_like(rows)
    for start in range(0, rows.shape[1], _CHUNK):
        chunk = slice(start, min(start + _CHUNK, rows.shape[1]))
        chosen = order[chunk]
        weights = rows[:, chosen]
        target = weights + hessian.ahead(errors, chunk)
        runs = chosen[:: grid.together] // sub
        codes[:, chosen[:: grid.group] // grid.group], errors[:, chunk] = grid.feed_back(
            grid.together, target, weights, hessian.part(chunk), steps[:, runs], lows[:, runs], pool
        )
    for index, columns in enumerate(matrix.columns):
        groups = slice(columns.start // grid.group, columns.stop // grid.group)
        matrix.set_codes(index, found[index], codes[:, groups])
