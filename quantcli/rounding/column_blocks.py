"""Columns of an integer grid in blocks that the native kernels take.

The kernels want at most 256 columns, whole runs of 16 under one scale, and blocks of 32 at least.
A block holds whole groups, or a part of one; each group's columns in it are filled up to a
multiple of 16 with columns that no Hessian ties to any other, so that they change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Floats
from quantcli.rounding.packed_matrix import KERNEL_COLUMNS

RUN = 16
"""Columns that share a step and a minimum in the kernels."""
_BLOCK = 32


@dataclass(frozen=True, eq=False)
class ColumnBlock:
    """Columns of a matrix, the groups that they are in, and where the kernels see them.

    ``places`` has a place below ``width`` for each column, ``owners`` the group within
    ``groups`` of each run of 16, or -1 for a run of filling.
    """

    columns: slice
    groups: slice
    places: NDArray[np.int64]
    owners: NDArray[np.int64]

    @property
    def width(self) -> int:
        """Columns as the kernels see them."""
        return len(self.owners) * RUN

    def widen(self, values: NDArray[Any], fill: float = 0) -> NDArray[Any]:
        """``values`` (n, columns) at their places, ``fill`` between them."""
        wide = np.full((len(values), self.width), fill, values.dtype)
        wide[:, self.places] = values
        return wide

    def widen_square(self, values: Floats) -> Floats:
        """``values`` (columns, columns) at their places, an identity between them."""
        wide = np.eye(self.width, dtype=np.float32)
        wide[np.ix_(self.places, self.places)] = values
        return wide

    def widen_groups(self, values: Floats, fill: float) -> Floats:
        """One of ``values`` (n, groups of the matrix) for each run, ``fill`` in filling."""
        own = values[:, self.groups]
        found = own[:, np.maximum(self.owners, 0)]
        return np.ascontiguousarray(np.where(self.owners < 0, np.float32(fill), found))


def cut_column_blocks(columns: int, group: int) -> list[ColumnBlock]:
    """Panels over ``columns``, of groups of ``group`` columns."""
    whole = -(-group // RUN) * RUN
    if whole <= KERNEL_COLUMNS:
        step = KERNEL_COLUMNS // whole
        count = columns // group
        return [
            _column_block(start * group, [group] * (min(start + step, count) - start), start)
            for start in range(0, count, step)
        ]
    return [
        _column_block(first + start, [min(KERNEL_COLUMNS, group - start)], first // group)
        for first in range(0, columns, group)
        for start in range(0, group, KERNEL_COLUMNS)
    ]


def _column_block(start: int, sizes: list[int], first: int) -> ColumnBlock:
    places: list[NDArray[np.int64]] = []
    owners: list[int] = []
    for number, size in enumerate(sizes):
        places.append(len(owners) * RUN + np.arange(size, dtype=np.int64))
        owners += [number] * -(-size // RUN)
    owners += [-1] * (len(owners) % (_BLOCK // RUN))
    return ColumnBlock(
        slice(start, start + sum(sizes)), slice(first, first + len(sizes)),
        np.concatenate(places), np.array(owners, np.int64),
    )  # fmt: skip
