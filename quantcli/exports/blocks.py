"""GGUF's blocks of 32: the grids that they are on, and their codes and scales.

Q4_0, Q5_0 and Q8_0 are symmetric groups of 32 (a scale times code less half the range), Q4_1 and
Q5_1 affine ones (a scale times code plus the value of code 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.formats import get_format, native
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.legacy import split_fifth_bits, split_nibbles
from quantcli.formats.search import from_halves

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
