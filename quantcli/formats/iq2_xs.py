"""IQ2_XS: eight weights as one of 512 points, with seven signs; 2.3125 bits per weight.

======  =====  ==========================================================================
offset  bytes  content (256 weights)
======  =====  ==========================================================================
0       2      ``d``, float16
2       64     a little-endian word for every eight weights: 9 bits of point, 7 of signs
66      8      scales ``l`` of the blocks of 16, four bits each
======  =====  ==========================================================================

A weight is ``sign * point * (l + 0.5) / 4 * d``, with signs as in IQ2_XXS. Mirrors
``quantize_row_iq2_xs_impl``, which refuses to work without importance.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.codebook import (
    SUPER,
    all_signs,
    apply_signs,
    even_signs,
    largest,
    round_scales,
    search_weights,
    sign_bytes,
)
from quantcli.formats.grids import load_grid
from quantcli.formats.iq2_search import search
from quantcli.formats.search import ALL_ZERO, from_halves, halves

NBYTES = 74
BLOCK = 16
PARTS = SUPER // BLOCK
_TRIALS = range(-9, 10)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    weights = search_weights(rows, importance, 1).reshape(-1, BLOCK)
    x, negative = even_signs(rows.reshape(-1, BLOCK), weights)
    scale, points = search(x, weights, load_grid("IQ2_XS"), _TRIALS)
    negative ^= (scale < 0)[:, None]
    empty = x.max(axis=1) < ALL_ZERO
    scales = np.where(empty, np.float32(0), np.abs(scale)).reshape(-1, PARTS)
    points[empty] = 0
    negative[empty] = False

    top = largest(scales)
    d = top / np.float32(31)
    words = points | (sign_bytes(negative) & 127).astype(np.int64) << 9
    steps = round_scales(scales, d)
    parts = [
        halves(d),
        words.reshape(len(d), -1).astype("<u2").view(np.uint8),
        (steps[:, 0::2] | steps[:, 1::2] << 4).astype(np.uint8),
    ]
    packed = np.concatenate(parts, axis=1)
    packed[top == 0] = 0
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    words = np.ascontiguousarray(blocks[:, 2:66]).view("<u2")
    steps = np.stack([blocks[:, 66:] & 15, blocks[:, 66:] >> 4], axis=2).reshape(-1, PARTS)
    half = steps.astype(np.float32) + np.float32(0.5)
    scales = from_halves(blocks, 0) * half * np.float32(0.25)
    points = load_grid("IQ2_XS").points[words & 511].reshape(-1, BLOCK)
    signs = all_signs(words >> 9).reshape(-1, 2)
    return apply_signs(scales.reshape(-1, 1) * points, signs).reshape(len(packed), -1)


FORMAT = BlockFormat(
    "IQ2_XS", 17, SUPER, NBYTES, quantize, dequantize,
    half_scales=(0,), fallback="IQ4_NL", needs_importance=True,
)  # fmt: skip
