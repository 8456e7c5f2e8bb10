"""IQ1_S: eight weights as one of 2048 points of -1, 0 and 1; 1.5625 bits per weight.

======  =====  ==========================================================================
offset  bytes  content (256 weights)
======  =====  ==========================================================================
0       2      ``d``, float16
2       32     points, the low eight bits, one for every eight weights
34      16     a little-endian word for each 32 weights: three high bits of each of its four
               points, lowest first, 3 bits of scale ``l``, and whether the shift is down
======  =====  ==========================================================================

A weight is ``(point + shift) * (2l + 1) * d`` with a shift of 1/8 or -1/8. Mirrors
``quantize_row_iq1_s_impl``, which refuses to work without importance.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.codebook import SUPER, largest, round_scales, search_weights
from quantcli.formats.grids import load_grid
from quantcli.formats.iq1_search import SHIFT, place, split_blocks
from quantcli.formats.search import Codes, from_halves, halves

NBYTES = 50
BLOCK = 32
PARTS = SUPER // BLOCK
_EMPTY = np.float32(1e-12)
_FUDGE = np.float32(1.125)
"""On ``d``: makes up for what the rounding of the blocks' scales loses."""
_HIGH_SHIFTS = 3 * np.arange(4, dtype=np.int32)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    x = rows.reshape(-1, BLOCK)
    weights = search_weights(rows, importance, 2).reshape(-1, BLOCK)
    cut = split_blocks(x, weights, halves=False)
    cut = replace(cut, found=cut.found & ~(np.abs(x).max(axis=1) < _EMPTY))
    down = ((cut.shift == 1) & cut.found)[:, None].repeat(4, axis=1)
    scale, points = place(x, weights, cut, down, load_grid("IQ1_S"))

    scales = scale.reshape(-1, PARTS)
    top = largest(scales)
    d, there = top / np.float32(15), top[:, None] != 0
    steps = np.where(there, round_scales(scales, d, 7), 0)
    shifts = np.where(there, down[:, 0].reshape(-1, PARTS), 0)
    return join(halves(d * _FUDGE), points.reshape(len(d), -1), steps, shifts).reshape(
        len(rows), -1
    )


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    numbers, steps, down = split(blocks)
    points = load_grid("IQ1_S").points[numbers.reshape(-1, PARTS, 4)]
    shift = np.where(down, -SHIFT, SHIFT)
    scales = from_halves(blocks, 0) * (2 * steps + 1).astype(np.float32)
    values: Floats = scales[:, :, None, None] * (points + shift[:, :, None, None])
    return values.reshape(len(packed), -1)


def split(blocks: Bytes) -> tuple[Codes, Codes, Codes]:
    """Points (n, 32), scales ``l`` (n, 8) and whether they are shifted down (n, 8) of blocks."""
    words = np.ascontiguousarray(blocks[:, 34:]).view("<u2").astype(np.int32)
    high = (words[:, :, None] >> _HIGH_SHIFTS & 7).reshape(len(blocks), -1)
    return blocks[:, 2:34] | high << 8, words >> 12 & 7, words >> 15


def join(
    d: Bytes, points: NDArray[np.integer], steps: NDArray[np.integer], down: NDArray[np.integer]
) -> Bytes:
    """The blocks of ``d``, float16 bytes, and what `split` gives."""
    high = ((points >> 8).reshape(-1, PARTS, 4) << _HIGH_SHIFTS).sum(axis=2)
    words = (high | steps << 12 | down << 15).astype("<u2").view(np.uint8)
    return np.concatenate([d, (points & 255).astype(np.uint8), words], axis=1)


FORMAT = BlockFormat(
    "IQ1_S", 19, SUPER, NBYTES, quantize, dequantize,
    half_scales=(0,), fallback="IQ4_NL", needs_importance=True,
)  # fmt: skip
