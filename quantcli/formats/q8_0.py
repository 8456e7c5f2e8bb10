"""Q8_0: 32 weights as signed bytes under one float16 scale; 8.5 bits per weight.

======  =====  ===================
offset  bytes  content
======  =====  ===================
0       2      ``d``, float16
2       32     codes, signed bytes
======  =====  ===================

A weight is ``code * d``. Importance weights do not apply: llama.cpp ignores them here as well.
Mirrors ``quantize_row_q8_0_ref``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.legacy import inverse_of, truncate
from quantcli.formats.search import from_halves, halves

BLOCK, NBYTES = 32, 34


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1) / np.float32(127)
    with np.errstate(all="ignore"):
        scaled = blocks * inverse_of(scale)[:, None]
        whole = np.trunc(scaled)
        # roundf: halves away from zero; the fraction is exact, adding 0.5 first would not be.
        away = np.abs(scaled - whole) >= np.float32(0.5)
        codes = truncate(whole + np.where(away, np.copysign(np.float32(1), scaled), np.float32(0)))
    packed = np.concatenate([halves(scale), codes.astype(np.int8).view(np.uint8)], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    values = blocks[:, 2:].view(np.int8).astype(np.float32) * from_halves(blocks, 0)
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat("Q8_0", 8, BLOCK, NBYTES, quantize, dequantize, half_scales=(0,))
