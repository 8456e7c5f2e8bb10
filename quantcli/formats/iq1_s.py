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

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.codebook import SUPER, largest, round_scales, search_weights
from quantcli.formats.grids import load_grid
from quantcli.formats.iq1_search import place, split_blocks
from quantcli.formats.search import from_halves, halves

NBYTES = 50
BLOCK = 32
PARTS = SUPER // BLOCK
_EMPTY = np.float32(1e-12)
_FUDGE = np.float32(1.125)
"""On ``d``: makes up for what the rounding of the blocks' scales loses."""
_HIGH_SHIFTS = 3 * np.arange(4)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    x = rows.reshape(-1, BLOCK)
    weights = search_weights(rows, importance, 2).reshape(-1, BLOCK)
    split = split_blocks(x, weights, halves=False)
    split = replace(split, found=split.found & ~(np.abs(x).max(axis=1) < _EMPTY))
    down = ((split.shift == 1) & split.found)[:, None].repeat(4, axis=1)
    scale, points = place(x, weights, split, down, load_grid("IQ1_S"))

    scales = scale.reshape(-1, PARTS)
    top = largest(scales)
    d = top / np.float32(15)
    steps = round_scales(scales, d, 7) | down[:, 0].reshape(-1, PARTS) << 3
    words = ((points >> 8) << _HIGH_SHIFTS).sum(axis=1).reshape(-1, PARTS)
    words |= np.where(top[:, None] == 0, 0, steps.astype(np.int64) << 12)
    parts = [
        halves(d * _FUDGE),
        (points & 255).astype(np.uint8).reshape(len(d), -1),
        words.astype("<u2").view(np.uint8),
    ]
    return np.concatenate(parts, axis=1).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    words = np.ascontiguousarray(blocks[:, 34:]).view("<u2").astype(np.int64)
    high = words[:, :, None] >> _HIGH_SHIFTS & 7
    points = load_grid("IQ1_S").points[blocks[:, 2:34].reshape(-1, PARTS, 4) | high << 8]
    shift = np.where(words >> 15, np.float32(-0.125), np.float32(0.125))
    scales = from_halves(blocks, 0) * (2 * (words >> 12 & 7) + 1).astype(np.float32)
    values: Floats = scales[:, :, None, None] * (points + shift[:, :, None, None])
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat(
    "IQ1_S", 19, SUPER, NBYTES, quantize, dequantize,
    half_scales=(0,), fallback="IQ4_NL", needs_importance=True,
)  # fmt: skip
