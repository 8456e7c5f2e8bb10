"""Q5_0: 32 weights as signed 5-bit codes under one float16 scale; 5.5 bits per weight.

======  =====  ==================================================================
offset  bytes  content
======  =====  ==================================================================
0       2      ``d``, float16
2       4      fifth bits: bit j of the little-endian word belongs to weight j
6       16     low four bits: byte j holds weight j (low) and weight j+16 (high)
======  =====  ==================================================================

A weight is ``(code - 16) * d``. Without importance weights the value of largest magnitude becomes
-16, so the scale may be negative. Mirrors ``quantize_row_q5_0_ref`` and ``quantize_row_q5_0_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.legacy import (
    join_fifth_bits,
    join_nibbles,
    signed_scale,
    split_fifth_bits,
    split_nibbles,
    truncate,
)
from quantcli.formats.search import (
    from_halves,
    halves,
    importance_weights,
    row_variance,
    search_symmetric,
)

BLOCK, NBYTES = 32, 22


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    if importance is None:
        scale, inverse = signed_scale(blocks, -16)
        with np.errstate(all="ignore"):
            codes = np.minimum(truncate(blocks * inverse[:, None] + np.float32(16.5)), 31)
    else:
        weights = importance_weights(rows, importance, row_variance(rows)).reshape(-1, BLOCK)
        scale, codes = search_symmetric(blocks, weights, 16)
    packed = np.concatenate([halves(scale), join_fifth_bits(codes), join_nibbles(codes)], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = split_nibbles(blocks[:, 6:]) | split_fifth_bits(blocks[:, 2:6])
    values = (codes - 16).astype(np.float32) * from_halves(blocks, 0)
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat("Q5_0", 6, BLOCK, NBYTES, quantize, dequantize, half_scales=(0,))
