"""Weights of one byte each, E4M3 or int8, with scales per tensor, row or block.

A weight stands for ``(code - zero) * scale`` in float32. The scale holds one number for the
tensor, for each matrix of a stack, for each row, or for each block of rows and columns; blocks at
the right and bottom edge may be cut short. Only the scales of the rows asked for are read, so
memory stays bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.float_grid import BLOCK, FloatGrid, FloatStrategy, ScaleKind
from quantcli.formats.integer import IntegerGrid
from quantcli.layouts.stored import FLOATS, Floats, Span, StoredTensors
from quantcli.layouts.stored_codes import Ranges, StoredCodes, scale_kind
from quantcli.types import PackedType, TensorInfo

E4M3 = "F8_E4M3"
INT8 = "I8"
MX_GROUP = 32
"""Weights under a power of two."""
SCALE_DTYPES = (*FLOATS, "F8_E8M0")

_CODES: Floats = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_STRIP = 1 << 18
"""Codes decoded at once: NumPy widens the indices eightfold."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale tensor of one weight, seen as (matrices, grid rows, grid columns)."""

    name: str
    matrices: int
    grid_rows: int
    grid_columns: int
    block_rows: int
    block_columns: int

    def row_numbers(self, start: int, stop: int, rows: int) -> NDArray[np.int64]:
        """Flattened scale row of each of the weight's flattened rows ``start:stop``."""
        numbers = np.arange(start, stop, dtype=np.int64)
        matrix = numbers // rows if self.matrices > 1 else 0
        return np.asarray(matrix * self.grid_rows + (numbers % rows) // self.block_rows)


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A `PackedWeight` of byte codes; ``zeros`` names int8 zero points shaped as the scale.

    ``factor`` is what every product is multiplied with; ``others`` are parts that say nothing.
    E4M3 keeps its dtype as its type. ``grid`` is what the codes lie on, if on any.
    """

    info: TensorInfo
    scale: Scale
    zeros: str | None = None
    factor: float = 1.0
    others: tuple[str, ...] = ()
    grid: FloatGrid | IntegerGrid | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Codes, scale, zero points and others."""
        rest = () if self.zeros is None else (self.zeros,)
        return (self.info.name, self.scale.name, *rest, *self.others)

    def read(self, source: StoredTensors, rows: Span, columns: Span) -> Floats:
        """A rectangle of the weight, leading axes flattened, in float32."""
        codes = source.load(self.info.name, rows, columns)
        if codes.size == 0:
            return np.empty(codes.shape, dtype=np.float32)
        width = self.scale.block_columns
        numbers = self._numbers(rows)
        weights = widen(codes)
        for name in (self.zeros, self.scale.name):
            if name is None:
                continue
            grid = self._grid(source, name, numbers, (columns[0] // width, -(-columns[1] // width)))
            for index, part in enumerate(_block_columns(codes.shape[1], columns[0], width)):
                if name == self.zeros:
                    weights[:, part] -= grid[:, index, None]
                else:
                    weights[:, part] *= grid[:, index, None]
        if self.factor != 1.0:
            weights *= np.float32(self.factor)
        return weights

    @property
    def coded(self) -> StoredCodes | None:
        """The codes, where they lie on a grid."""
        if self.grid is None:
            return None
        return StoredCodes(self.grid, self._codes, self._ranges)

    def _codes(self, source: StoredTensors, start: int, stop: int) -> NDArray[np.uint8]:
        codes = source.load(self.info.name, (start, stop))
        if codes.dtype != np.int8:
            return codes
        middle = 1 << (self.grid.bits - 1 if self.grid else 7)
        return (codes.astype(np.int16) + np.int16(middle)).astype(np.uint8)

    def _ranges(self, source: StoredTensors, start: int, stop: int) -> Ranges:
        numbers, columns = self._numbers((start, stop)), (0, self.scale.grid_columns)
        scales = self._grid(source, self.scale.name, numbers, columns)
        if self.zeros is None:
            return scales, None
        zeros = self._grid(source, self.zeros, numbers, columns).astype(np.int32)
        return scales, zeros + np.int32(1 << (self.grid.bits - 1 if self.grid else 7))

    def _numbers(self, rows: Span) -> NDArray[np.int64]:
        matrix_rows = self.info.shape[-2] if len(self.info.shape) > 1 else 1
        return self.scale.row_numbers(*rows, matrix_rows)

    def _grid(self, source: StoredTensors, name: str, numbers: Any, columns: Span) -> Floats:
        """Numbers of the grid for each row, and for the grid's columns that are needed."""
        span = (int(numbers[0]), int(numbers[-1]) + 1)
        values = source.load(name, span, columns, width=self.scale.grid_columns)
        if values.dtype == np.uint8:
            values = values.view(ml_dtypes.float8_e8m0fnu)
        return np.asarray(values.astype(np.float32)[numbers - numbers[0]])


def build_scaled(
    tensors: Mapping[str, TensorInfo],
    codes: TensorInfo,
    scale: Scale,
    *,
    kind: PackedType | None = None,
    zeros: str | None = None,
    factor: float = 1.0,
    others: tuple[str, ...] = (),
    bits: int = 8,
) -> ScaledWeight:
    """The weight of these parts of ``tensors``, shown as ``kind`` or, for E4M3, as its dtype.

    ``bits`` are those of its integers.
    """
    grid = None
    if factor == 1.0 and len(codes.shape) > 1:
        grid = _find_grid(
            codes, scale, tensors[scale.name].dtype, bits, has_zeros=zeros is not None
        )
    shown = ScaledWeight(codes, scale, zeros, factor, others, grid)
    dtype = codes.dtype if kind is None else kind
    nbytes = sum(tensors[part].nbytes for part in shown.parts)
    return replace(shown, info=replace(codes, dtype=dtype, nbytes=nbytes))


def _find_grid(
    codes: TensorInfo, scale: Scale, dtype: str, bits: int, *, has_zeros: bool
) -> FloatGrid | IntegerGrid | None:
    """The grid of codes under such scales; None where there is none of that span."""
    size: int | None = None
    span: FloatStrategy
    if scale.grid_rows == scale.grid_columns == 1:
        span = "tensor"
    elif scale.block_rows == 1 and scale.grid_columns == 1:
        span = "channel"
    elif scale.block_rows == 1:
        span, size = "group", scale.block_columns
    elif scale.block_rows == scale.block_columns == BLOCK:
        span = "block"
    else:
        return None
    if codes.dtype == E4M3:
        scales: ScaleKind = "E8M0" if size == MX_GROUP and dtype in ("U8", "F8_E8M0") else "float"
        return FloatGrid("E4M3", span, size, scales, scale_kind(dtype))
    if span == "block":
        return None
    return IntegerGrid(bits, "integer" if has_zeros else "middle", span, size, scale_kind(dtype))


def widen(codes: NDArray[Any]) -> Floats:
    """Float32 of E4M3 codes (as uint8) or int8 codes; NaN stays NaN, for the caller to refuse."""
    if codes.dtype == np.int8:
        return codes.astype(np.float32)
    weights = np.empty(codes.shape, dtype=np.float32)
    step = max(1, _STRIP // max(1, codes.shape[1]))
    for top in range(0, codes.shape[0], step):
        np.take(_CODES, codes[top : top + step], out=weights[top : top + step], mode="clip")
    return weights


def fit_scale(
    weight: TensorInfo,
    scale: TensorInfo,
    block: tuple[int, int] | None,
    dtypes: tuple[str, ...] = SCALE_DTYPES,
) -> Scale:
    """How ``scale`` lies over ``weight``; SourceError when it does not. ``block`` is config's."""
    where = f"{scale.file}: tensor {scale.name!r}"
    kind = "FP8" if weight.dtype == E4M3 else "int8"
    if scale.dtype not in dtypes:
        raise SourceError(f"{where} is the scale of an {kind} weight but has dtype {scale.dtype}")
    shape = (1, 1, *weight.shape)[-max(2, len(weight.shape)) :]
    stack, (rows, columns) = shape[:-2], shape[-2:]
    matrices = math.prod(stack)
    if scale.elements == 1:
        return Scale(scale.name, 1, 1, 1, max(rows, 1), max(columns, 1))
    if scale.shape in (stack, (*stack, 1), (*stack, 1, 1)):
        return Scale(scale.name, matrices, 1, 1, rows, columns)
    if scale.shape in ((*stack, rows), (*stack, rows, 1)):
        return Scale(scale.name, matrices, rows, 1, 1, columns)
    if len(scale.shape) == len(shape) and block is None:
        raise SourceError(
            f"{where} scales blocks of {weight.name!r}, but config.json has no weight_block_size"
        )
    if block is not None:
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        if scale.shape == (*stack, *grid):
            return Scale(scale.name, matrices, *grid, *block)
    raise SourceError(
        f"{where} has shape {list(scale.shape)}, which scales neither the whole, the rows nor the "
        f"blocks of {weight.name!r} with shape {list(weight.shape)}"
        + (f" and blocks of {list(block)}" if block else "")
    )


def _block_columns(width: int, first_column: int, block_columns: int) -> Iterator[slice]:
    """The column ranges that share a scale, counted from the first column at hand."""
    edge = 0
    while edge < width:
        reach = block_columns - (first_column + edge) % block_columns
        yield slice(edge, min(edge + reach, width))
        edge += reach
