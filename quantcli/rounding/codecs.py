"""Codecs of weight matrices: a block format of GGUF, or the integer grid of a model folder.

Both have one interface: encode, decode and choice of codes, on packed rows. An integer
grid's rows are packed for the run's own store alone: the codes, then the scales (float32), then
the zero points (int32) or edges (float32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from quantcli.formats import get_format, native
from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.integer import IntegerCodes, IntegerGrid, dequantize, quantize
from quantcli.plan.folders import FolderPlan
from quantcli.plan.planner import Plan
from quantcli.rounding.block_feedback import encode_columns, round_with_feedback
from quantcli.rounding.descent import sweep
from quantcli.rounding.grid_feedback import find_ranges, refine_on_grid, round_on_grid
from quantcli.rounding.options import Options
from quantcli.rounding.packed_matrix import PackedMatrix, has_lattice
from quantcli.statistics.hessian import Hessian
from quantcli.types import Matrix
from quantcli.workers import Workers


class WeightCodec(Protocol):
    """A way to store rows (n, columns), float32, as packed rows (n, row bytes), uint8."""

    @property
    def name(self) -> str:
        """The name in reports."""

    @property
    def identity(self) -> str:
        """A string that differs between codecs of different results."""

    @property
    def rounds(self) -> bool:
        """Whether anything is lost beyond what a float type loses."""

    @property
    def has_codes(self) -> bool:
        """Whether a method can choose its codes."""

    def encode(self, rows: Floats, importance: Floats | None, pool: Workers) -> Bytes:
        """Round to nearest, ranges weighted by the columns' importance."""

    def decode(self, packed: Bytes) -> Floats:
        """The weights in packed rows, float32."""

    @property
    def by_rows(self) -> bool:
        """Whether rows can be rounded independently of each other."""

    def descend(
        self, rows: Floats, hessian: Hessian, importance: Floats, options: Options, pool: Workers
    ) -> Bytes:
        """GPTQ and the sweeps after it."""

    def refine(self, packed: Bytes, rows: Floats, hessian: Hessian, pool: Workers) -> Bytes:
        """Another sweep from packed rows towards ``rows``."""


@dataclass(frozen=True)
class BlockCodec:
    """A block format."""

    format: BlockFormat

    @property
    def name(self) -> str:
        """The format's name."""
        return self.format.name

    @property
    def identity(self) -> str:
        """The same."""
        return self.format.name

    @property
    def rounds(self) -> bool:
        """Whether it is no float type."""
        return self.format.block > 1

    @property
    def has_codes(self) -> bool:
        """Whether a method can choose its codes."""
        return has_lattice(self.format.name)

    @property
    def by_rows(self) -> bool:
        """They are."""
        return True

    def encode(self, rows: Floats, importance: Floats | None, pool: Workers) -> Bytes:
        """The encoder's own blocks."""
        return encode_columns(self.format, rows, importance, pool)

    def decode(self, packed: Bytes) -> Floats:
        """The weights in the blocks."""
        return native.decode(self.format, packed)

    def descend(
        self, rows: Floats, hessian: Hessian, importance: Floats, options: Options, pool: Workers
    ) -> Bytes:
        """GPTQ and the sweeps after it."""
        matrix = round_with_feedback(
            self.format, rows, hessian, importance, pool, options.block_sweeps
        )
        for _ in range(options.sweeps_after(hessian)):
            sweep(matrix, hessian, pool)
        return matrix.pack()

    def refine(self, packed: Bytes, rows: Floats, hessian: Hessian, pool: Workers) -> Bytes:
        """Another sweep from packed rows towards ``rows``."""
        matrix = PackedMatrix(self.format, rows)
        matrix.unpack(packed)
        sweep(matrix, hessian, pool)
        return matrix.pack()


@dataclass(frozen=True)
class GridCodec:
    """An integer grid; ``label`` is the scheme's."""

    grid: IntegerGrid
    label: str

    @property
    def name(self) -> str:
        """The scheme's label."""
        return self.label

    @property
    def identity(self) -> str:
        """All that the grid is."""
        return repr(self.grid)

    @property
    def rounds(self) -> bool:
        """It does."""
        return True

    @property
    def has_codes(self) -> bool:
        """A method can choose them."""
        return True

    @property
    def by_rows(self) -> bool:
        """Unless the whole matrix has one scale."""
        return self.grid.strategy != "tensor"

    def encode(self, rows: Floats, importance: Floats | None, pool: Workers) -> Bytes:
        """Round to nearest under the ranges of least weighted squared error."""
        scales, zeros = find_ranges(rows, self.grid, importance, pool)
        codes = np.empty(rows.shape, np.uint8)

        def share(start: int, stop: int) -> None:
            part = slice(start, stop)
            zero = None if zeros is None else zeros[part]
            codes[part] = quantize(rows[part], scales[part], zero, self.grid)

        pool.run(len(rows), share)
        return self.pack(IntegerCodes(codes, scales, zeros))

    def decode(self, packed: Bytes) -> Floats:
        """The weights of the codes."""
        return dequantize(self.unpack(packed), self.grid)

    def descend(
        self, rows: Floats, hessian: Hessian, importance: Floats, options: Options, pool: Workers
    ) -> Bytes:
        """GPTQ and the sweeps after it."""
        return self.pack(round_on_grid(rows, self.grid, hessian, importance, pool, options))

    def refine(self, packed: Bytes, rows: Floats, hessian: Hessian, pool: Workers) -> Bytes:
        """Another sweep from packed rows towards ``rows``."""
        return self.pack(refine_on_grid(self.unpack(packed), rows, self.grid, hessian, pool))

    def pack(self, coded: IntegerCodes) -> Bytes:
        """Packed rows; scales and zeros have a row for each row of codes."""
        parts = [coded.codes, np.ascontiguousarray(coded.scales).view(np.uint8)]
        if coded.zeros is not None:
            parts.append(np.ascontiguousarray(coded.zeros).view(np.uint8))
        return np.concatenate(parts, axis=1)

    def unpack(self, packed: Bytes) -> IntegerCodes:
        """The codes, scales and zeros of packed rows."""
        width, each = packed.shape[1], 4 if self.grid.symmetric else 8
        size = self.grid.group_size
        groups = 1
        if self.grid.strategy == "group" and size is not None:
            groups = width // (size + each)
        columns = width - groups * each
        floats = np.ascontiguousarray(packed[:, columns : columns + 4 * groups])
        zeros = None
        if not self.grid.symmetric:
            kind = np.float32 if self.grid.zero == "edge" else np.int32
            zeros = np.ascontiguousarray(packed[:, columns + 4 * groups :]).view(kind)
        return IntegerCodes(
            np.ascontiguousarray(packed[:, :columns]), floats.view(np.float32), zeros
        )


def find_codecs(plan: Plan | FolderPlan) -> tuple[dict[str, WeightCodec], dict[str, WeightCodec]]:
    """Forms by GGUF tensor: of what a method rounds, and of everything that is quantized."""
    if isinstance(plan, Plan):
        every: dict[str, WeightCodec] = {
            item.tensor.name: BlockCodec(get_format(item.format)) for item in plan.items
        }
        return {i.tensor.name: every[i.tensor.name] for i in plan.items if i.importance}, every
    if plan.scheme is None:
        raise ValueError("the plan has no integer grid")
    codec = GridCodec(plan.scheme.grid, plan.scheme.label)
    every = {item.matrix.tensor: codec for item in plan.items}
    groups = plan.scheme.grid.group_size or 1
    rounded = [i for i in plan.items if i.importance and keeps_groups(i.matrix, groups)]
    return {item.matrix.tensor: codec for item in rounded}, every


def keeps_groups(matrix: Matrix, size: int) -> bool:
    """Whether columns that share a scale in a folder are neighbours in the GGUF tensor as well."""
    if matrix.turned is None:
        return True
    groups = matrix.turned.turned_columns.reshape(-1, size)
    firsts = groups[:, :1]
    return bool((firsts % size == 0).all() and (groups == firsts + np.arange(size)).all())
