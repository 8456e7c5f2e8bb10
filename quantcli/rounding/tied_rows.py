"""Feedback among rows and columns at once, in a block format: column block by column block.

`quantcli.rounding.row_feedback` says what is computed. A group's row feedback asks for the errors
of the groups before it in the same columns alone, and its column feedback for its own errors in the
columns before. So all groups go through one block of columns before the next one: what the columns
before ask of all rows is one large product instead of one for each group, and the Hessian is read
once. Within a block, groups follow one another, and the threads share a group's rows.

The sweep after that takes group by group, each from what all rows have lost, and a thread takes
some of its rows through all columns.

For n rows of a strip, and C columns, in float32 unless packed:

    bytes = 4 n C (errors) + packed rows + 8 n^2 (Fisher information and its factor) + 3 KiB n,

besides the weights that are given and the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from quantcli.formats import native
from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.layerwise.products import SHARE, multiply, product
from quantcli.layerwise.steady import run_tasks
from quantcli.rounding.block_feedback import BlockRounding
from quantcli.rounding.options import Options
from quantcli.rounding.packed_matrix import PackedMatrix, RowOrder
from quantcli.statistics.hessian import Hessian
from quantcli.workers import Workers

_LEAST = 16
"""Rows that a kernel takes at once."""


@dataclass(frozen=True, eq=False)
class RowTies:
    """What rows in an order ask of one another: ``groups`` of them, rounded at once.

    ``ahead`` (rows, rows) has in each row what those before it ask of it; ``share`` gives what all
    rows ask of a group once they are rounded, (group, rows).
    """

    groups: Sequence[slice]
    ahead: Floats
    share: Callable[[slice], Floats]

    @classmethod
    def of(
        cls, factor: Floats, groups: Sequence[slice], share: Callable[[slice], Floats]
    ) -> RowTies:
        """From the Fisher information's ``factor``."""
        return cls(groups, torch.from_numpy(factor).T.contiguous().numpy(), share)

    def split(self, group: slice) -> list[slice]:
        """A group's rows for the threads, of which two at least get some."""
        count = group.stop - group.start
        step = min(SHARE, max(_LEAST, -(-count // (2 * _LEAST)) * _LEAST))
        return [
            slice(start, min(start + step, group.stop))
            for start in range(group.start, group.stop, step)
        ]


def round_tied(
    fmt: BlockFormat, rows: Floats, order: RowOrder, hessian: Hessian, importance: Floats,
    ties: RowTies, options: Options,
) -> Bytes:  # fmt: skip
    """Packed rows of a strip of ``rows`` (n, columns), in the order of ``ties``."""
    matrix = PackedMatrix(fmt, rows, order)
    for index in range(len(matrix.columns)):
        block = BlockRounding.of(matrix, index, hessian, importance, options.block_sweeps)
        _round_block(matrix, index, block, ties, hessian)
    if options.sweeps:
        _set_errors(matrix)
    for _ in range(options.sweeps):
        for group in ties.groups:
            aimed = product(ties.share(group), matrix.errors)
            tasks = [
                partial(_sweep_rows, matrix, rows, _within(aimed, rows, group), hessian)
                for rows in ties.split(group)
            ]
            run_tasks(tasks)
    return matrix.pack()


def _within(values: Floats, rows: slice, group: slice) -> Floats:
    return values[rows.start - group.start : rows.stop - group.start]


def _round_block(
    matrix: PackedMatrix, index: int, block: BlockRounding, ties: RowTies, hessian: Hessian
) -> None:
    """All groups through one block of columns; the matrix keeps errors less what rows ask."""
    pull = hessian.ahead(matrix.errors, block.columns)
    lost = np.empty(pull.shape, np.float32)

    def share(rows: slice, before: int) -> None:
        weights = matrix.weights(block.columns, rows)
        carried = multiply(ties.ahead[rows, :before], lost[:before]) if before else None
        aim = weights if carried is None else weights + carried
        parts, errors = block.round(aim, pull[rows])
        matrix.set_parts(index, parts, rows, errors)
        lost[rows] = errors if carried is None else errors - carried

    for group in ties.groups:
        run_tasks([partial(share, rows, group.start) for rows in ties.split(group)])


def _set_errors(matrix: PackedMatrix) -> None:
    """Set the errors to what each row has lost."""
    every = slice(0, matrix.rows.shape[1])

    def share(rows: slice) -> None:
        values = native.decode(matrix.format, matrix.packed[rows])
        np.subtract(matrix.weights(every, rows), values, out=matrix.errors[rows])

    run_tasks(
        [
            partial(share, slice(start, min(start + SHARE, matrix.count)))
            for start in range(0, matrix.count, SHARE)
        ]
    )


def _sweep_rows(matrix: PackedMatrix, rows: slice, aimed: Floats, hessian: Hessian) -> None:
    """A sweep of some rows over all columns, from the errors that they are to make up for."""
    slopes, alone = hessian.follow(aimed), Workers()
    for index, columns in enumerate(matrix.columns):
        own = hessian.own(columns)
        parts = matrix.grid.sweep(matrix.parts(index, rows), own, slopes.of(columns), alone)
        before = matrix.errors[rows, columns].copy()
        matrix.set_parts(index, parts, rows)
        slopes.change(columns, matrix.errors[rows, columns] - before)
