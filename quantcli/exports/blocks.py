"""The codes of a GGUF's blocks of 32, for layouts that hold the same grids.

Q4_0, Q5_0 and Q8_0 are symmetric groups of 32 (a scale times code less half the range), Q4_1 and
Q5_1 affine ones (a scale times code plus the value of code 0). Another format holds the very same
weights where it has that many bits and can say the zero point: a whole number in AWQ, GPTQ and
compressed-tensors, any float in MLX. MXFP4 has the same codes and scales everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.checkpoint_view import CheckpointView
from quantcli.errors import PlanError
from quantcli.formats import get_format, native
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.integer import GridCodes, IntegerGrid, dequantize
from quantcli.formats.legacy import split_fifth_bits, split_nibbles
from quantcli.formats.search import from_halves
from quantcli.types import Matrix

GROUP = 32
MXFP4 = "MXFP4"


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The grid of a block format: bits, bytes of a block, and whether it stores code 0's value."""

    bits: int
    nbytes: int
    affine: bool = False


GRIDS: Mapping[str, BlockGrid] = {
    "Q4_0": BlockGrid(4, 18),
    "Q4_1": BlockGrid(4, 20, affine=True),
    "Q5_0": BlockGrid(5, 22),
    "Q5_1": BlockGrid(5, 24, affine=True),
    "Q8_0": BlockGrid(8, 34),
}


class BlockCodes:
    """Gives the codes of a GGUF's blocks on another grid of the same weights.

    A `CodeSource` that rounds nothing. PlanError where the grid does not hold a row's weights, bit
    for bit.
    """

    def __init__(self, view: CheckpointView, grid: IntegerGrid) -> None:
        self._view = view
        self._grid = grid

    def __call__(self, matrix: Matrix, start: int, rows: NDArray[np.float32]) -> GridCodes:
        """The codes of the stored ``rows`` of ``matrix`` from ``start`` on."""
        first = matrix.first + start
        raw = self._view.read_held(matrix.source, first, first + len(rows))
        kind = self._view.holder(matrix.source).dtype
        coded = convert(kind, raw, self._grid)
        # A block whose scale is no number is no weight of any row, and so refused.
        with np.errstate(over="ignore", invalid="ignore"):
            apart = dequantize(coded, self._grid) != rows
        if apart.any():
            row, column = (int(index) for index in np.argwhere(apart)[0])
            raise PlanError(
                f"{matrix.source} is {kind}, and the weight {rows[row, column]} at row "
                f"{first + row}, column {column} is none of the {self._grid.bits}-bit grid's, "
                f"whose zero points are whole numbers"
                if self._grid.zero == "integer"
                else f"{matrix.source}: a scale of {kind} at row {first + row}, column {column} "
                f"does not fit {self._grid.scale_dtype}"
            )
        return coded


class StoredRows:
    """Gives a GGUF's packed rows as they are: a `CodeSource` for a layout's ``blocks``."""

    def __init__(self, view: CheckpointView) -> None:
        self._view = view

    def __call__(self, matrix: Matrix, start: int, rows: NDArray[Any]) -> GridCodes:
        """The packed rows behind the decoded ``rows`` of ``matrix`` from ``start`` on."""
        first = matrix.first + start
        packed = self._view.read_held(matrix.source, first, first + len(rows))
        return GridCodes(packed, np.empty((0, 0), np.float32))


def encode_mxfp4(rows: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Rows that lie on an MXFP4 grid as GGUF's blocks; None when they do not.

    The encoder takes the exponent from the largest weight, which may be lower than the stored
    one, but then every weight is on that finer grid as well.
    """
    fmt = get_format(MXFP4)
    packed = native.encode(fmt, rows)
    return packed if np.array_equal(native.decode(fmt, packed), rows) else None


def split_blocks(kind: str, packed: Bytes) -> tuple[NDArray[np.uint8], Floats, Floats | None]:
    """Codes (rows, columns) from 0 on, scales (rows, groups), and code 0's values if affine."""
    grid = GRIDS[kind]
    rows = len(packed)
    blocks = packed.reshape(-1, grid.nbytes)
    scales = from_halves(blocks, 0).reshape(rows, -1)
    edges = from_halves(blocks, 2).reshape(rows, -1) if grid.affine else None
    if grid.bits == 8:
        return (blocks[:, 2:] ^ np.uint8(128)).reshape(rows, -1), scales, None
    codes = split_nibbles(blocks[:, -16:])
    if grid.bits == 5:
        codes = codes | split_fifth_bits(blocks[:, -20:-16])
    return codes.astype(np.uint8).reshape(rows, -1), scales, edges


def convert(kind: str, packed: Bytes, grid: IntegerGrid) -> GridCodes:
    """Packed rows as codes of ``grid``, of the same bits; the caller holds them against rows."""
    codes, scales, edges = split_blocks(kind, packed)
    middle = np.float32(grid.middle)
    if grid.zero == "middle":
        return GridCodes(codes, scales)
    if grid.zero == "edge":
        if edges is None:
            with np.errstate(over="ignore"):
                edges = (-middle * scales).astype(np.float16).astype(np.float32)
        return GridCodes(codes, scales, edges)
    if edges is None:
        return GridCodes(codes, scales, np.full(scales.shape, grid.middle, np.int32))
    with np.errstate(all="ignore"):
        zeros = np.where(scales != 0, np.rint(-edges / scales), 0)
    return GridCodes(codes, scales, np.clip(zeros, 0, grid.top).astype(np.int32))
