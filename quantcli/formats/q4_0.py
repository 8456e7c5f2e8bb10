"""Q4_0: 32 weights as signed 4-bit codes under one float16 scale; 4.5 bits per weight.

======  =====  ==========================================================
offset  bytes  content
======  =====  ==========================================================
0       2      ``d``, float16
2       16     codes: byte j holds weight j (low) and weight j+16 (high)
======  =====  ==========================================================

A weight is ``(code - 8) * d``. Without importance weights the value of largest magnitude becomes
-8, so the scale may be negative. Mirrors ``quantize_row_q4_0_ref`` and ``quantize_row_q4_0_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.legacy import join_nibbles, signed_scale, split_nibbles, truncate
from quantcli.formats.search import (
    from_halves,
    halves,
    importance_weights,
    row_variance,
    search_symmetric,
)

BLOCK, NBYTES = 32, 18


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    if importance is None:
        scale, inverse = signed_scale(blocks, -8)
        with np.errstate(all="ignore"):
            codes = np.minimum(truncate(blocks * inverse[:, None] + np.float32(8.5)), 15)
    else:
        weights = importance_weights(rows, importance, row_variance(rows)).reshape(-1, BLOCK)
        scale, codes = search_symmetric(blocks, weights, 8)
    packed = np.concatenate([halves(scale), join_nibbles(codes)], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = split_nibbles(blocks[:, 2:])
    values = (codes - 8).astype(np.float32) * from_halves(blocks, 0)
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat("Q4_0", 2, BLOCK, NBYTES, quantize, dequantize, half_scales=(0,))
