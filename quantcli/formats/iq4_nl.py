"""IQ4_NL: 32 weights as 4-bit codes of sixteen uneven levels under one float16 scale; 4.5 bits.

======  =====  ==========================================================
offset  bytes  content
======  =====  ==========================================================
0       2      ``d``, float16
2       16     codes: byte j holds weight j (low) and weight j+16 (high)
======  =====  ==========================================================

A weight is ``LEVELS[code] * d``; the levels lie closer together where weights are frequent. The
scale is searched for: sixteen are tried, the one with the largest ``(sum w x q)^2 / sum w q^2``
wins, and the codes are then rounded under it as it is in float32. Mirrors
``quantize_row_iq4_nl_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.legacy import inverse_of, join_nibbles, split_nibbles
from quantcli.formats.search import (
    Codes,
    from_halves,
    halves,
    importance_weights,
    ordered_sum,
)

BLOCK, NBYTES = 32, 18

LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)
_TRIALS = range(-7, 8)
_ALL_ZERO = np.float32(1e-15)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    scale = search_scale(blocks, search_weights(rows, importance, BLOCK))
    packed = np.concatenate([halves(scale), join_nibbles(encode(blocks, scale))], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    values = from_halves(blocks, 0) * LEVELS[split_nibbles(blocks[:, 2:])]
    return values.reshape(len(packed), -1)


def search_weights(rows: Floats, importance: Floats | None, size: int) -> Floats:
    """Weights of the search, shape (blocks, 32): ``importance * sqrt(sigma2 + x^2)`` or ``x^2``.

    ``sigma2`` is twice the mean square over ``size`` weights.
    """
    x = rows.reshape(-1, size)
    with np.errstate(all="ignore"):
        squares = x * x
        if importance is None:
            return squares.reshape(-1, BLOCK)
        sigma2 = ordered_sum(squares)[:, None] * np.float32(2 / size)
    spread = np.broadcast_to(importance, rows.shape).reshape(-1, size)
    return importance_weights(x, spread, sigma2).reshape(-1, BLOCK)


def nearest_level(values: Floats) -> Codes:
    """Codes of the nearest levels, the upper one of two equally near; NaN gets the last."""
    return np.searchsorted(_MIDDLES, values, side="right").astype(np.int32)


def encode(blocks: Floats, scale: Floats) -> Codes:
    """Codes of blocks of shape (n, 32) under scales of shape (n,); a scale of 0 codes zeros."""
    with np.errstate(all="ignore"):
        return nearest_level(inverse_of(scale)[:, None] * blocks)


def search_scale(x: Floats, weights: Floats) -> Floats:
    """The best scale, shape (n,), of each block of shape (n, 32); 0 for a block of zeros."""
    with np.errstate(all="ignore"):
        return _search_scale(x, weights)


def _search_scale(x: Floats, w: Floats) -> Floats:
    top = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]

    def fit(inverse: Floats) -> tuple[Floats, Floats]:
        level = LEVELS[nearest_level(inverse[:, None] * x)]
        wl = w * level
        return ordered_sum(wl * x), ordered_sum(wl * level)

    sum_lx, sum_l2 = fit(np.float32(1) / (-top / LEVELS[0]))
    scale: Floats = np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0))
    best = scale * sum_lx
    for trial in _TRIALS:
        sum_lx, sum_l2 = fit((np.float32(trial) + LEVELS[0]) / top)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best = np.where(better, scale * sum_lx, best)
    return np.where(np.abs(top) < _ALL_ZERO, np.float32(0), scale)


FORMAT = BlockFormat("IQ4_NL", 20, BLOCK, NBYTES, quantize, dequantize, half_scales=(0,))
