"""IQ2_XXS: eight weights to a byte, as one of 256 points, with seven signs; 2.0625 bits per weight.

======  =====  ==========================================================================
offset  bytes  content (256 weights)
======  =====  ==========================================================================
0       2      ``d``, float16
2       64     for each 32 weights four points, one for every eight weights, and a little-endian
               word: 7 bits of signs for every eight, lowest first, and 4 bits of scale ``l``
======  =====  ==========================================================================

A weight is ``sign * point * (l + 0.5) / 4 * d``. The eighth sign is the parity of the other seven,
so the number of minus signs is even; where it is odd in the weights, the one that matters least is
given the wrong sign. Mirrors ``quantize_row_iq2_xxs_impl``, which refuses to work without
importance.
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
from quantcli.formats.ksearch import search_positive
from quantcli.formats.search import ALL_ZERO, from_halves, halves

NBYTES = 66
BLOCK = 32
PARTS = SUPER // BLOCK
_TRIALS = range(-6, 7)
_SIGN_SHIFTS = 7 * np.arange(4, dtype=np.uint32)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    weights = search_weights(rows, importance, 1).reshape(-1, BLOCK)
    x, negative = even_signs(rows.reshape(-1, BLOCK), weights)
    fitted, _ = search_positive(x, weights, 4)
    scale, points = search(x, weights, load_grid("IQ2_XXS"), _TRIALS, fitted=fitted)
    negative ^= (scale < 0)[:, None]
    empty = (x.max(axis=1) < ALL_ZERO) | (fitted <= 0)
    scales = np.where(empty, np.float32(0), np.abs(scale)).reshape(-1, PARTS)
    points[empty] = 0
    negative[empty] = False

    top = largest(scales)
    d = top / np.float32(31)
    signs = (sign_bytes(negative) & 127).astype(np.uint32) << _SIGN_SHIFTS
    words = signs.sum(axis=1, dtype=np.uint32)
    words |= round_scales(scales, d).astype(np.uint32).reshape(-1) << np.uint32(28)
    coded = np.concatenate(
        [points.astype(np.uint8), words.astype("<u4")[:, None].view(np.uint8)], 1
    )
    packed = np.concatenate([halves(d), coded.reshape(len(d), -1)], axis=1)
    packed[top == 0] = 0
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    coded = np.ascontiguousarray(blocks[:, 2:]).reshape(-1, 8)
    words = np.ascontiguousarray(coded[:, 4:]).view("<u4")
    half = (words >> 28).astype(np.float32).reshape(-1, PARTS) + np.float32(0.5)
    scales = from_halves(blocks, 0) * half * np.float32(0.25)
    points = load_grid("IQ2_XXS").points[coded[:, :4]].reshape(-1, BLOCK)
    values = apply_signs(scales.reshape(-1, 1) * points, all_signs(words >> _SIGN_SHIFTS))
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat(
    "IQ2_XXS", 16, SUPER, NBYTES, quantize, dequantize,
    half_scales=(0,), fallback="IQ4_NL", needs_importance=True,
)  # fmt: skip
