"""Q2_0: 64 weights as 2-bit codes under one float16 scale; 2.25 bits per weight.

======  =====  =====================================================================
offset  bytes  content
======  =====  =====================================================================
0       2      ``d``, float16
2       16     codes: byte j holds weights 4j to 4j+3, from its lowest bits upwards
======  =====  =====================================================================

A weight is ``(code - 1) * d``. As ``d`` is the block's largest magnitude, code 3 (``2 * d``) is
never written, but it is read. Importance weights do not apply. Mirrors ``quantize_row_q2_0_ref``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.search import from_halves, halves
from quantcli.formats.ternary import ternary_codes

BLOCK, NBYTES = 64, 18
_SHIFTS = np.arange(0, 8, 2, dtype=np.int32)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    scale, codes = ternary_codes(blocks, uninvertible=0)
    quads = (codes.reshape(-1, 16, 4) << _SHIFTS).sum(axis=2).astype(np.uint8)
    return np.concatenate([halves(scale), quads], axis=1).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = blocks[:, 2:, None].astype(np.int32) >> _SHIFTS & 3
    values = (codes - 1).astype(np.float32).reshape(-1, BLOCK) * from_halves(blocks, 0)
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat(
    "Q2_0", 42, BLOCK, NBYTES, quantize, dequantize, half_scales=(0,), fallback="Q4_0"
)
