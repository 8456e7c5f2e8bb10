"""IQ2_S: eight weights as one of 1024 points, with all their signs; 2.5625 bits per weight.

======  =====  ==========================================================================
offset  bytes  content (256 weights)
======  =====  ==========================================================================
0       2      ``d``, float16
2       32     points, the low eight bits, one for every eight weights
34      32     signs, one bit for each weight
66      8      points, the two high bits
74      8      scales ``l`` of the blocks of 16, four bits each
======  =====  ==========================================================================

A weight is ``sign * point * (l + 0.5) / 4 * d``. Mirrors ``quantize_row_iq2_s_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.codebook import (
    SUPER,
    apply_signs,
    largest,
    round_scales,
    search_weights,
    sign_bytes,
)
from quantcli.formats.grids import load_grid
from quantcli.formats.iq2_search import search
from quantcli.formats.search import from_halves, halves

NBYTES = 82
BLOCK = 16
PARTS = SUPER // BLOCK
_TRIALS = range(-9, 10)
_EMPTY = np.float32(1e-8)
_FUDGE = np.float32(0.9875)
"""On ``d``: makes up for what the rounding of the blocks' scales loses."""
_HIGH_SHIFTS = 2 * np.arange(4)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    negative = ~(blocks >= 0)
    x = np.where(negative, -blocks, blocks)
    weights = search_weights(rows, importance, 2, 0.25).reshape(-1, BLOCK)
    scale, points = search(x, weights, load_grid("IQ2_S"), _TRIALS)
    negative ^= (scale < 0)[:, None]
    empty = x.max(axis=1) < _EMPTY
    scales = np.where(empty, np.float32(0), np.abs(scale)).reshape(-1, PARTS)
    points[empty] = 0
    negative[empty] = False

    top = largest(scales)
    d = top / np.float32(31)
    steps = np.where(top[:, None] == 0, 0, round_scales(scales, d))
    high = ((points >> 8).reshape(-1, 4) << _HIGH_SHIFTS).sum(axis=1)
    parts = [
        halves(d * _FUDGE),
        (points & 255).reshape(len(d), -1),
        sign_bytes(negative).reshape(len(d), -1),
        high.reshape(len(d), -1),
        steps[:, 0::2] | steps[:, 1::2] << 4,
    ]
    return np.concatenate(parts, axis=1).astype(np.uint8).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    high = (blocks[:, 66:74, None] >> _HIGH_SHIFTS & 3).astype(np.int64).reshape(len(blocks), -1)
    points = load_grid("IQ2_S").points[blocks[:, 2:34] | high << 8].reshape(-1, BLOCK)
    steps = np.stack([blocks[:, 74:] & 15, blocks[:, 74:] >> 4], axis=2).reshape(-1, PARTS)
    half = steps.astype(np.float32) + np.float32(0.5)
    scales = from_halves(blocks, 0) * half * np.float32(0.25)
    values = apply_signs(scales.reshape(-1, 1) * points, blocks[:, 34:66].reshape(-1, 2))
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat(
    "IQ2_S", 22, SUPER, NBYTES, quantize, dequantize, half_scales=(0,), fallback="IQ4_NL"
)
