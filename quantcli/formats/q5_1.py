"""Q5_1: 32 weights as 5-bit codes between a float16 minimum and its scale; 6 bits per weight.

======  =====  ==================================================================
offset  bytes  content
======  =====  ==================================================================
0       2      ``d``, float16
2       2      ``m``, float16
4       4      fifth bits: bit j of the little-endian word belongs to weight j
8       16     low four bits: byte j holds weight j (low) and weight j+16 (high)
======  =====  ==================================================================

A weight is ``code * d + m``. Mirrors ``quantize_row_q5_1_ref`` and ``quantize_row_q5_1_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.legacy import (
    join_fifth_bits,
    join_nibbles,
    ranged_scale,
    split_fifth_bits,
    split_nibbles,
    truncate,
)
from quantcli.formats.search import (
    from_halves,
    halves,
    importance_weights,
    row_variance,
    search_affine,
)

BLOCK, NBYTES = 32, 24


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    if importance is None:
        scale, inverse, low = ranged_scale(blocks, 31)
        with np.errstate(all="ignore"):
            spread = (blocks - low[:, None]) * inverse[:, None]
            codes = truncate(spread + np.float32(0.5))
    else:
        weights = importance_weights(rows, importance, row_variance(rows)).reshape(-1, BLOCK)
        scale, low, codes = search_affine(blocks, weights, 31, rmin=-0.9, rdelta=0.05, nstep=36)
    parts = [halves(scale), halves(low), join_fifth_bits(codes), join_nibbles(codes)]
    return np.concatenate(parts, axis=1).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = split_nibbles(blocks[:, 8:]) | split_fifth_bits(blocks[:, 4:8])
    values = codes.astype(np.float32) * from_halves(blocks, 0) + from_halves(blocks, 2)
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat("Q5_1", 7, BLOCK, NBYTES, quantize, dequantize, half_scales=(0, 2))
