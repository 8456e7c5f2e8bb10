"""Q4_1: 32 weights as 4-bit codes between a float16 minimum and its scale; 5 bits per weight.

======  =====  ==========================================================
offset  bytes  content
======  =====  ==========================================================
0       2      ``d``, float16
2       2      ``m``, float16
4       16     codes: byte j holds weight j (low) and weight j+16 (high)
======  =====  ==========================================================

A weight is ``code * d + m``. Mirrors ``quantize_row_q4_1_ref`` and ``quantize_row_q4_1_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.legacy import join_nibbles, ranged_scale, split_nibbles, truncate
from quantcli.formats.search import (
    from_halves,
    halves,
    importance_weights,
    row_variance,
    search_affine,
)

BLOCK, NBYTES = 32, 20


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    if importance is None:
        scale, inverse, low = ranged_scale(blocks, 15)
        with np.errstate(all="ignore"):
            spread = (blocks - low[:, None]) * inverse[:, None]
            codes = np.minimum(truncate(spread + np.float32(0.5)), 15)
    else:
        weights = importance_weights(rows, importance, row_variance(rows)).reshape(-1, BLOCK)
        scale, low, codes = search_affine(blocks, weights, 15, rmin=-0.9, rdelta=0.05, nstep=36)
    packed = np.concatenate([halves(scale), halves(low), join_nibbles(codes)], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = split_nibbles(blocks[:, 4:])
    values = codes.astype(np.float32) * from_halves(blocks, 0) + from_halves(blocks, 2)
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat("Q4_1", 3, BLOCK, NBYTES, quantize, dequantize, half_scales=(0, 2))
