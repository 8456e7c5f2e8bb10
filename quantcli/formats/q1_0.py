"""Q1_0: 128 signs under one float16 scale; 1.125 bits per weight.

======  =====  ====================================================================
offset  bytes  content
======  =====  ====================================================================
0       2      ``d``, float16
2       16     signs: bit i of byte j is set where weight 8j+i is not negative
======  =====  ====================================================================

A weight is ``d`` or ``-d``, and ``d`` is the mean magnitude, summed in order. Importance weights do
not apply. Rows that 128 does not divide have no other format to go to: llama.cpp stops there, and
so do we. Mirrors ``quantize_row_q1_0_ref``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.search import from_halves, halves, ordered_sum

BLOCK, NBYTES = 128, 18


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    with np.errstate(over="ignore"):
        scale = ordered_sum(np.abs(blocks)) / np.float32(BLOCK)
    signs = np.packbits(blocks >= 0, axis=1, bitorder="little")
    return np.concatenate([halves(scale), signs], axis=1).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    scale = from_halves(blocks, 0)
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    values: Floats = np.where(signs != 0, scale, -scale)
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat("Q1_0", 41, BLOCK, NBYTES, quantize, dequantize, half_scales=(0,))
