"""A matrix of packed rows as columns of blocks, with its codes open to change.

`PackedMatrix` gives the `Parts` of each column block, in all rows or in some that one thread works
on, so that a method can take 32 to 256 columns at once with plain matrix products. Weights that are
coded one by one and groups that are points of a grid differ in `ScalarCodebook` and
`VectorCodebook`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.codebook_lattice import CODEBOOKS
from quantcli.formats.lattice import LATTICES, Parts
from quantcli.formats.search import Codes
from quantcli.rounding.scalar_codebook import ScalarCodebook
from quantcli.rounding.vector_codebook import VectorCodebook

KERNEL_COLUMNS = 256
"""Columns that the kernels take at once: one super-block, or several smaller blocks."""


EVERY = slice(None)
"""All rows."""

RowOrder = NDArray[np.int64]


def has_lattice(format_name: str) -> bool:
    """Whether a method can choose the codes of this block format."""
    return format_name in LATTICES or format_name in CODEBOOKS


@cache
def _grid(name: str) -> ScalarCodebook | VectorCodebook:
    if name in CODEBOOKS:
        return VectorCodebook.of(CODEBOOKS[name])
    return ScalarCodebook.of(LATTICES[name])


class PackedMatrix:
    """Rows in a block format, packed, with `Parts` of column blocks.

    A column block holds ``rows * blocks`` blocks, those of a row together. ``errors`` is weights
    less values, float32 (rows, columns), and is kept up to date. With an ``order`` the matrix has
    these of ``rows``, in this order.
    """

    def __init__(self, fmt: BlockFormat, rows: Floats, order: RowOrder | None = None) -> None:
        self.format = fmt
        self.grid = _grid(fmt.name)
        self.lattice = self.grid.lattice
        self.count = len(rows) if order is None else len(order)
        self.order = order
        self.rows = rows
        self.errors = np.zeros((self.count, rows.shape[1]), np.float32)
        columns = rows.shape[1]
        self.columns = [
            slice(i, min(i + KERNEL_COLUMNS, columns)) for i in range(0, columns, KERNEL_COLUMNS)
        ]
        self.packed = np.zeros((self.count, fmt.row_bytes(columns)), np.uint8)
        self._rounded = [False] * len(self.columns)

    def weights(self, columns: slice, rows: slice = EVERY) -> Floats:
        """A contiguous copy of some weights."""
        if self.order is not None:
            return np.ascontiguousarray(self.rows[self.order[rows], columns])
        return np.array(self.rows[rows, columns], np.float32, order="C")

    def parts(self, index: int, rows: slice = EVERY) -> Parts:
        """The parts of column block ``index``, which must have been set, in some rows."""
        if not self._rounded[index]:
            raise ValueError(f"column block {index} has not been rounded")
        return self.split(np.ascontiguousarray(self.packed[rows, self._bytes(index)]))

    def split(self, packed: Bytes) -> Parts:
        """Parts of a column block's packed rows."""
        return self.lattice.split(packed.reshape(-1, self.format.nbytes))

    def unpack(self, packed: Bytes) -> None:
        """Set all column blocks from whole packed rows."""
        for index in range(len(self.columns)):
            own = np.ascontiguousarray(packed[:, self._bytes(index)])
            self.set_parts(index, self.split(own))

    def steps(self, parts: Parts) -> tuple[Floats, Floats]:
        """A column block's steps and minimums in all rows, each (rows, columns / sub)."""
        step, low = self.lattice.steps(parts)
        return step.reshape(self.count, -1), low.reshape(self.count, -1)

    def values(self, parts: Parts, count: int) -> Floats:
        """The values of ``count`` rows of a column block."""
        return self.lattice.values(parts).reshape(count, -1)

    def set_parts(
        self, index: int, parts: Parts, rows: slice = EVERY, errors: Floats | None = None
    ) -> None:
        """Set some rows of a column block, and ``errors``: those of the weights if not given."""
        columns = self.columns[index]
        count = len(range(*rows.indices(self.count)))
        if errors is None:
            errors = self.weights(columns, rows) - self.values(parts, count)
        self.errors[rows, columns] = errors
        self.packed[rows, self._bytes(index)] = self.lattice.join(parts).reshape(count, -1)
        self._rounded[index] = True

    def choose(self, parts: Parts, codes: Codes) -> Parts:
        """The parts with ``codes`` (rows, columns / group) under their scales.

        Where a scale is zero the code says nothing, and the one of ``parts`` stays.
        """
        steps, _ = self.lattice.steps(parts)
        unscaled = np.repeat(steps == 0, self.lattice.sub // self.grid.group, axis=1)
        chosen = np.where(unscaled, parts.codes, codes.reshape(parts.codes.shape))
        return replace(parts, codes=chosen)

    def set_codes(self, index: int, parts: Parts, codes: Codes) -> None:
        """Set a column block to `choose`."""
        self.set_parts(index, self.choose(parts, codes))

    def pack(self) -> Bytes:
        """The packed rows, uint8 of shape (rows, row bytes)."""
        return self.packed

    def _bytes(self, index: int) -> slice:
        columns = self.columns[index]
        return slice(self.format.row_bytes(columns.start), self.format.row_bytes(columns.stop))
