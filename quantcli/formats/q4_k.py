"""Q4_K: 256 weights as 4-bit codes, a 6-bit scale and minimum per 32; 4.5 bits per weight.

======  =====  ====================================================================
offset  bytes  content
======  =====  ====================================================================
0       2      ``d``, float16
2       2      ``dmin``, float16
4       12     eight scales and minimums: see `quantcli.formats.kquants.join_scales`
16      128    codes: byte i of each 32 holds weights i (low) and i+32 of its 64
======  =====  ====================================================================

A weight is ``d * scale * code - dmin * minimum``. Mirrors ``quantize_row_q4_K_ref`` and
``quantize_row_q4_K_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.kquants import (
    SUPER,
    AffineType,
    affine_scales,
    join_planes,
    join_scales,
    round_affine,
    scaled,
    search_affine_blocks,
    split_planes,
)
from quantcli.formats.search import halves

NBYTES = 144
_TYPE = AffineType(length=32, top=15, scale_top=63, trials=(-1.0, 0.1, 20), factor=2)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    found = search_affine_blocks(rows, importance, _TYPE)
    scales, mins = found.scales, found.mins
    if importance is None:
        scales, mins = np.minimum(scales, 63), np.minimum(mins, 63)
    head = np.concatenate([halves(found.d), halves(found.dmin), join_scales(scales, mins)], axis=1)
    codes = round_affine(rows, *affine_scales(head), found.codes, 15)
    return np.concatenate([head, join_planes(codes, 4, 32)], axis=1).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    scale, low = affine_scales(blocks[:, :16])
    values = scaled(split_planes(blocks[:, 16:], 4, 32), scale) - low[:, :, None]
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat(
    "Q4_K", 12, SUPER, NBYTES, quantize, dequantize, half_scales=(0, 2), fallback="Q5_0"
)
