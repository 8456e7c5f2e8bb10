"""IQ3_S: four weights as one of 512 points, with all their signs; 3.4375 bits per weight.

======  =====  ==========================================================================
offset  bytes  content (256 weights)
======  =====  ==========================================================================
0       2      ``d``, float16
2       64     points, the low eight bits, one for every four weights
66      8      points, the ninth bits
74      32     signs, one bit for each weight
106     4      scales ``l`` of the sub-blocks of 32, four bits each
======  =====  ==========================================================================

A weight is ``sign * point * (2l + 1) * d``. A sub-block of zeros writes neither low bits nor signs,
and those of the sub-blocks after it move up into its place, while ninth bits and scales stay: so
ggml's encoder has it, and a decoder reads them where they do not belong. Mirrors
``quantize_row_iq3_s_impl``.
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
from quantcli.formats.iq3_search import BLOCK, PARTS, search
from quantcli.formats.search import from_halves, halves

NBYTES = 110
_TRIALS = range(-9, 10)
_FUDGE = np.float32(1.033)
"""On ``d``: makes up for what the rounding of the sub-blocks' scales loses."""


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    negative = ~(blocks >= 0)
    x = np.where(negative, -blocks, blocks)
    weights = search_weights(rows, importance, 2).reshape(-1, BLOCK)
    scale, points = search(x, weights, load_grid("IQ3_S"), _TRIALS, search_all=True)
    negative ^= (scale < 0)[:, None]
    empty = x.max(axis=1) == 0
    scales = np.where(empty, np.float32(0), np.abs(scale)).reshape(-1, PARTS)
    points[empty] = 0

    top = largest(scales)
    d = top / np.float32(31)
    steps = np.where(top[:, None] == 0, 0, round_scales(scales, d))
    order = np.argsort(empty.reshape(-1, PARTS), axis=1, kind="stable")[:, :, None]
    low = np.take_along_axis((points & 255).reshape(-1, PARTS, 8), order, axis=1)
    ninth = np.packbits((points >> 8).astype(np.uint8), axis=1, bitorder="little")
    signs = np.where(empty[:, None], 0, sign_bytes(negative)).reshape(-1, PARTS, 4)
    signs = np.take_along_axis(signs, order, axis=1)
    with np.errstate(over="ignore"):
        parts = [
            halves(d * _FUDGE),
            low.reshape(len(d), -1),
            ninth.reshape(len(d), -1),
            signs.reshape(len(d), -1),
            steps[:, 0::2] | steps[:, 1::2] << 4,
        ]
    return np.concatenate(parts, axis=1).astype(np.uint8).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    ninth = np.unpackbits(np.ascontiguousarray(blocks[:, 66:74]), axis=1, bitorder="little")
    points = load_grid("IQ3_S").points[blocks[:, 2:66] | ninth.astype(np.int64) << 8]
    steps = np.stack([blocks[:, 106:] & 15, blocks[:, 106:] >> 4], axis=2).reshape(-1, PARTS)
    scales = from_halves(blocks, 0) * (2 * steps + 1).astype(np.float32)
    values = scales.reshape(-1, 1) * points.reshape(-1, BLOCK)
    return apply_signs(values, blocks[:, 74:106].reshape(-1, 4)).reshape(len(packed), -1)


FORMAT = BlockFormat(
    "IQ3_S", 21, SUPER, NBYTES, quantize, dequantize, half_scales=(0,), fallback="IQ4_NL"
)
