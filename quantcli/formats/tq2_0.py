"""TQ2_0: 256 trits, four in a byte, under one float16 scale; 2.0625 bits per weight.

======  =====  ===============================================================================
offset  bytes  content
======  =====  ===============================================================================
0       64     byte j of the first 32 holds weights j, j+32, j+64 and j+96 from its lowest bits
               upwards; the second 32 hold weights 128 to 255 alike
64      2      ``d``, float16
======  =====  ===============================================================================

A weight is ``(code - 1) * d``, and ``d`` is the block's largest magnitude. Importance weights do
not apply. Mirrors ``quantize_row_tq2_0_ref``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.search import from_halves, halves
from quantcli.formats.ternary import ternary_codes

BLOCK, NBYTES = 256, 66
_SHIFTS = np.arange(0, 8, 2, dtype=np.int32)[:, None]


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    scale, codes = ternary_codes(blocks, uninvertible=1)
    quads = (codes.reshape(-1, 2, 4, 32) << _SHIFTS).sum(axis=2).reshape(-1, 64)
    packed = np.concatenate([quads.astype(np.uint8), halves(scale)], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = blocks[:, :64].reshape(-1, 2, 1, 32).astype(np.int32) >> _SHIFTS & 3
    values = (codes - 1).astype(np.float32).reshape(-1, BLOCK) * from_halves(blocks, 64)
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat(
    "TQ2_0", 35, BLOCK, NBYTES, quantize, dequantize, half_scales=(64,), fallback="Q4_0"
)
