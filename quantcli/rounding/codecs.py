"""Codecs of weight matrices: a block format of GGUF, or a grid of a model folder.

Both have one interface: encode, decode and choice of codes, on packed rows. A grid's rows are
packed for the run's own store alone: the codes, then the scales (float32), then the zero points
(int32) or edges (float32), or NVFP4's scale of the whole matrix (float32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np

from quantcli.artifacts.largest_weights import largest_in_tensor, largest_weight
from quantcli.artifacts.nvfp4_scales import scaled_tensors
from quantcli.formats import get_format, native, scaled_nvfp4
from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.float_grid import BLOCK
from quantcli.formats.integer import GridCodes
from quantcli.layouts.base import CodeGrid
from quantcli.model import Model
from quantcli.plan.folders import FolderPlan
from quantcli.plan.planner import Plan
from quantcli.rounding.encoded_columns import encode_columns
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
        # These divide their work as torch is made to, so torch has to be there.
        from quantcli.rounding.block_feedback import round_with_feedback
        from quantcli.rounding.descent import sweep

        matrix = round_with_feedback(
            self.format, rows, hessian, importance, pool, options.block_sweeps
        )
        for _ in range(options.sweeps_after(hessian)):
            sweep(matrix, hessian)
        return matrix.pack()

    def unscaled(self, rows: Floats) -> Floats:
        """The rows that the blocks hold."""
        return rows

    def refine(self, packed: Bytes, rows: Floats, hessian: Hessian, pool: Workers) -> Bytes:
        """Another sweep from packed rows towards ``rows``."""
        from quantcli.rounding.descent import sweep

        matrix = PackedMatrix(self.format, rows)
        matrix.unpack(packed)
        sweep(matrix, hessian)
        return matrix.pack()


@dataclass(frozen=True)
class ScaledBlockCodec(BlockCodec):
    """NVFP4 under a scale of the whole tensor, which ``largest``, its largest weight, gives."""

    largest: Callable[[], float]

    @cached_property
    def scale(self) -> np.float32:
        """The tensor's scale."""
        return np.float32(scaled_nvfp4.tensor_scale(self.largest()))

    @property
    def identity(self) -> str:
        """The format, and that it is scaled."""
        return f"{self.format.name} under a scale"

    def encode(self, rows: Floats, importance: Floats | None, pool: Workers) -> Bytes:
        """Round to nearest under the scales of least weighted squared error."""
        packed = np.empty((len(rows), self.format.row_bytes(rows.shape[1])), np.uint8)

        def share(start: int, stop: int) -> None:
            part = rows[start:stop]
            packed[start:stop] = scaled_nvfp4.encode(part, float(self.scale), importance)

        pool.run(len(rows), share)
        return packed

    def decode(self, packed: Bytes) -> Floats:
        """The weights in the blocks, scaled."""
        return super().decode(packed) * self.scale

    def descend(
        self, rows: Floats, hessian: Hessian, importance: Floats, options: Options, pool: Workers
    ) -> Bytes:
        """GPTQ and the sweeps after it, on what the scale leaves."""
        return super().descend(self.unscaled(rows), hessian, importance, options, pool)

    def refine(self, packed: Bytes, rows: Floats, hessian: Hessian, pool: Workers) -> Bytes:
        """Another sweep from packed rows towards ``rows``."""
        return super().refine(packed, self.unscaled(rows), hessian, pool)

    def unscaled(self, rows: Floats) -> Floats:
        """The rows less the scale."""
        return rows / self.scale


@dataclass(frozen=True)
class GridCodec:
    """A grid of a model folder; ``label`` is the scheme's.

    ``largest`` gives the largest magnitude of what shares NVFP4's scale of a whole matrix.
    """

    unbound: CodeGrid
    label: str
    largest: Callable[[], float] | None = None

    @cached_property
    def grid(self) -> CodeGrid:
        """The grid with that scale, if it has one."""
        if self.largest is None or not self.unbound.needs_whole:
            return self.unbound
        return self.unbound.bind(self.largest())

    @property
    def name(self) -> str:
        """The scheme's label."""
        return self.label

    @property
    def identity(self) -> str:
        """All that the grid is."""
        return repr(self.unbound)

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
        """Unless rows share a scale."""
        return self.unbound.by_rows

    def encode(self, rows: Floats, importance: Floats | None, pool: Workers) -> Bytes:
        """Round to nearest under the ranges of least weighted squared error."""
        scales, zeros = find_ranges(rows, self.grid, importance, pool)
        codes = np.empty(rows.shape, np.uint8)

        def share(start: int, stop: int) -> None:
            part = slice(start, stop)
            zero = None if zeros is None else zeros[part]
            codes[part] = self.grid.quantize(rows[part], scales[part], zero)

        pool.run(len(rows), share)
        return self.pack(GridCodes(codes, scales, zeros, self.grid.whole))

    def decode(self, packed: Bytes) -> Floats:
        """The weights of the codes."""
        return self.grid.dequantize(self.unpack(packed))

    def descend(
        self, rows: Floats, hessian: Hessian, importance: Floats, options: Options, pool: Workers
    ) -> Bytes:
        """GPTQ and the sweeps after it."""
        return self.pack(round_on_grid(rows, self.grid, hessian, importance, pool, options))

    def refine(self, packed: Bytes, rows: Floats, hessian: Hessian, pool: Workers) -> Bytes:
        """Another sweep from packed rows towards ``rows``."""
        return self.pack(refine_on_grid(self.unpack(packed), rows, self.grid, hessian, pool))

    def pack(self, coded: GridCodes) -> Bytes:
        """Packed rows; scales and zeros have a row for each row of codes."""
        parts = [coded.codes, np.ascontiguousarray(coded.scales).view(np.uint8)]
        if coded.zeros is not None:
            parts.append(np.ascontiguousarray(coded.zeros).view(np.uint8))
        if self.unbound.needs_whole:
            whole = np.full((len(coded.codes), 1), coded.whole or 1.0, np.float32)
            parts.append(whole.view(np.uint8))
        return np.concatenate(parts, axis=1)

    def unpack(self, packed: Bytes) -> GridCodes:
        """The codes, scales and zeros of packed rows."""
        whole = None
        if self.unbound.needs_whole:
            whole = float(np.ascontiguousarray(packed[:1, -4:]).view(np.float32)[0, 0])
            packed = packed[:, :-4]
        groups, columns = self._split(packed.shape[1])
        floats = np.ascontiguousarray(packed[:, columns : columns + 4 * groups])
        zeros = None
        if not self.unbound.symmetric:
            kind = np.float32 if self.unbound.zero == "edge" else np.int32
            zeros = np.ascontiguousarray(packed[:, columns + 4 * groups :]).view(kind)
        return GridCodes(
            np.ascontiguousarray(packed[:, :columns]), floats.view(np.float32), zeros, whole
        )

    def _split(self, width: int) -> tuple[int, int]:
        """Scales and columns of rows that take ``width`` bytes, without a whole matrix's scale."""
        each = 4 if self.unbound.symmetric else 8
        if self.unbound.strategy == "block":
            groups = -(-width // (BLOCK + each))
        elif self.unbound.strategy == "group" and self.unbound.group_size is not None:
            groups = width // (self.unbound.group_size + each)
        else:
            groups = 1
        return groups, width - groups * each


def find_codecs(
    plan: Plan | FolderPlan, model: Model
) -> tuple[dict[str, WeightCodec], dict[str, WeightCodec]]:
    """Forms by GGUF tensor: of what a method rounds, and of everything that is quantized."""
    if isinstance(plan, Plan):
        scaled = {tensor.name for tensor in scaled_tensors(plan).values()}
        every: dict[str, WeightCodec] = {
            item.tensor.name: ScaledBlockCodec(
                get_format(item.format), partial(largest_in_tensor, model, item.tensor)
            )
            if item.tensor.name in scaled
            else BlockCodec(get_format(item.format))
            for item in plan.items
        }
        return {i.tensor.name: every[i.tensor.name] for i in plan.items if i.importance}, every
    schemes = {item.matrix.tensor: item.scheme for item in plan.items if item.scheme is not None}
    if not schemes:
        raise ValueError("the plan has no grids")
    every = {
        name: GridCodec(scheme.grid, scheme.label, partial(largest_weight, model, name))
        for name, scheme in schemes.items()
    }
    rounded = [
        item.matrix.tensor
        for item in plan.items
        if item.importance and item.scheme and keeps_groups(item.matrix, item.scheme.grid)
    ]
    return {name: every[name] for name in rounded}, every


def keeps_groups(matrix: Matrix, grid: CodeGrid) -> bool:
    """Whether columns that share a scale in a folder are neighbours in the GGUF tensor as well."""
    if matrix.turned is None:
        return True
    size = BLOCK if grid.strategy == "block" else grid.group_size or 1
    if matrix.columns % size:
        return False
    groups = matrix.turned.turned_columns.reshape(-1, size)
    firsts = groups[:, :1]
    return bool((firsts % size == 0).all() and (groups == firsts + np.arange(size)).all())
