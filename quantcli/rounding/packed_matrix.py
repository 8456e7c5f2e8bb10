"""A matrix of packed rows as columns of blocks, with its codes open to change.

`PackedMatrix` holds one `Parts` for each column block, all rows together, so that a method can work
on 32 to 256 columns at once with plain matrix products. Weights that are coded one by one and
groups that are points of a grid differ in `ScalarCodebook` and `VectorCodebook`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.codebook_lattice import CODEBOOKS
from quantcli.formats.lattice import LATTICES, Parts
from quantcli.formats.search import Codes
from quantcli.rounding.scalar_codebook import ScalarCodebook
from quantcli.rounding.vector_codebook import VectorCodebook

KERNEL_COLUMNS = 256
"""Columns that the kernels take at once: one super-block, or several smaller blocks."""


def has_lattice(format_name: str) -> bool:
    """Whether a method can choose the codes of this block format."""
    return format_name in LATTICES or format_name in CODEBOOKS


def _grid(fmt: BlockFormat) -> ScalarCodebook | VectorCodebook:
    if fmt.name in CODEBOOKS:
        return VectorCodebook.of(CODEBOOKS[fmt.name])
    return ScalarCodebook.of(LATTICES[fmt.name])


class PackedMatrix:
    """Rows in a block format as `Parts` of column blocks.

    A column block holds ``rows * blocks`` blocks, those of a row together. ``errors`` is weights
    less values, float32 (rows, columns), and is kept up to date.
    """

    def __init__(self, fmt: BlockFormat, rows: Floats) -> None:
        self.format = fmt
        self.grid = _grid(fmt)
        self.lattice = self.grid.lattice
        self.rows = rows
        self.errors = np.zeros_like(rows)
        count = rows.shape[1]
        self.columns = [
            slice(i, min(i + KERNEL_COLUMNS, count)) for i in range(0, count, KERNEL_COLUMNS)
        ]
        self._parts: list[Parts | None] = [None] * len(self.columns)

    def parts(self, index: int) -> Parts:
        """The parts of column block ``index``, which must have been set."""
        found = self._parts[index]
        if found is None:
            raise ValueError(f"column block {index} has not been rounded")
        return found

    def split(self, packed: Bytes) -> Parts:
        """Parts of a column block's packed rows."""
        return self.lattice.split(packed.reshape(-1, self.format.nbytes))

    def unpack(self, packed: Bytes) -> None:
        """Set all column blocks from whole packed rows."""
        for index, columns in enumerate(self.columns):
            start, stop = (self.format.row_bytes(n) for n in (columns.start, columns.stop))
            self.set_parts(index, self.split(np.ascontiguousarray(packed[:, start:stop])))

    def steps(self, parts: Parts) -> tuple[Floats, Floats]:
        """A column block's steps and minimums, each (rows, columns / sub)."""
        step, low = self.lattice.steps(parts)
        return step.reshape(len(self.rows), -1), low.reshape(len(self.rows), -1)

    def set_parts(self, index: int, parts: Parts) -> None:
        """Set a column block, and the errors of its columns as they will be decoded."""
        columns = self.columns[index]
        self._parts[index] = parts
        values = self.lattice.values(parts).reshape(len(self.rows), -1)
        np.subtract(self.rows[:, columns], values, out=self.errors[:, columns])

    def set_codes(self, index: int, parts: Parts, codes: Codes) -> None:
        """Set a column block to ``codes`` (rows, columns / group) under the scales of ``parts``.

        Where a scale is zero the code says nothing, and the one of ``parts`` stays.
        """
        steps, _ = self.lattice.steps(parts)
        unscaled = np.repeat(steps == 0, self.lattice.sub // self.grid.group, axis=1)
        chosen = np.where(unscaled, parts.codes, codes.reshape(parts.codes.shape))
        self.set_parts(index, replace(parts, codes=chosen))

    def pack(self) -> Bytes:
        """The packed rows, uint8 of shape (rows, row bytes)."""
        joined = [self.lattice.join(self.parts(i)) for i in range(len(self.columns))]
        return np.concatenate([part.reshape(len(self.rows), -1) for part in joined], axis=1)
