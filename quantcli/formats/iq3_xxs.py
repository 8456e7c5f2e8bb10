"""IQ3_XXS: four weights to a byte, as one of 256 points, with seven signs to eight; 3.0625 bits.

======  =====  ==========================================================================
offset  bytes  content (256 weights)
======  =====  ==========================================================================
0       2      ``d``, float16
2       64     points, one for every four weights
66      32     eight little-endian words, one for each 32 weights: 7 bits of signs for every
               eight weights, lowest first, and 4 bits of scale ``l`` on top
======  =====  ==========================================================================

A weight is ``sign * point * (l + 0.5) / 2 * d``. The eighth sign is the parity of the other seven,
so the number of minus signs is even; where it is odd in the weights, the one that matters least is
given the wrong sign. Mirrors ``quantize_row_iq3_xxs_impl``.
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
from quantcli.formats.iq3_search import BLOCK, PARTS, search
from quantcli.formats.search import from_halves, halves

NBYTES = 98
_TRIALS = range(-15, 16)
_EMPTY = np.float32(1e-8)
_FUDGE = np.float32(1.0125)
"""On ``d``: makes up for what the rounding of the sub-blocks' scales loses."""
_SIGN_SHIFTS = 7 * np.arange(4, dtype=np.uint32)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    weights = search_weights(rows, importance, 2).reshape(-1, BLOCK)
    x, negative = even_signs(rows.reshape(-1, BLOCK), weights)
    scale, points = search(x, weights, load_grid("IQ3_XXS"), _TRIALS, search_all=False)
    negative ^= (scale < 0)[:, None]
    empty = x.max(axis=1) < _EMPTY
    scales = np.where(empty, np.float32(0), np.abs(scale)).reshape(-1, PARTS)
    points[empty] = 0
    negative[empty] = False

    top = largest(scales)
    d = top / np.float32(31)
    signs = (sign_bytes(negative) & 127).astype(np.uint32) << _SIGN_SHIFTS
    words = signs.sum(axis=1, dtype=np.uint32).reshape(-1, PARTS)
    words |= round_scales(scales, d).astype(np.uint32) << np.uint32(28)
    with np.errstate(over="ignore"):
        parts = [halves(d * _FUDGE), points.reshape(len(d), -1), words.astype("<u4").view(np.uint8)]
    packed = np.concatenate(parts, axis=1).astype(np.uint8)
    packed[top == 0] = 0
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    words = np.ascontiguousarray(blocks[:, 66:]).view("<u4")
    half = (words >> 28).astype(np.float32) + np.float32(0.5)
    scales = from_halves(blocks, 0) * half * np.float32(0.5)
    signs = all_signs(words[:, :, None] >> _SIGN_SHIFTS).reshape(-1, 4)
    points = load_grid("IQ3_XXS").points[blocks[:, 2:66]].reshape(-1, BLOCK)
    return apply_signs(scales.reshape(-1, 1) * points, signs).reshape(len(packed), -1)


FORMAT = BlockFormat(
    "IQ3_XXS", 18, SUPER, NBYTES, quantize, dequantize, half_scales=(0,), fallback="IQ4_NL"
)
