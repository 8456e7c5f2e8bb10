"""Q5_K: 256 weights as 5-bit codes, a 6-bit scale and minimum per 32; 5.5 bits per weight.

======  =====  =====================================================================
offset  bytes  content
======  =====  =====================================================================
0       2      ``d``, float16
2       2      ``dmin``, float16
4       12     eight scales and minimums: see `quantcli.formats.kquants.join_scales`
16      32     bit 4 of the codes: bit b of byte i belongs to weight 32*b + i
48      128    bits 0-3: byte i of each 32 holds weights i (low) and i+32 of its 64
======  =====  =====================================================================

A weight is ``d * scale * code - dmin * minimum``. Mirrors ``quantize_row_q5_K_ref`` and
``quantize_row_q5_K_impl``.
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

NBYTES = 176
_TYPE = AffineType(length=32, top=31, scale_top=63, trials=(-0.5, 0.1, 15), factor=2)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    found = search_affine_blocks(rows, importance, _TYPE)
    packed_scales = join_scales(np.minimum(found.scales, 63), np.minimum(found.mins, 63))
    head = np.concatenate([halves(found.d), halves(found.dmin), packed_scales], axis=1)
    codes = round_affine(rows, *affine_scales(head), found.codes, 31)
    planes = [join_planes(codes >> 4, 1, 32), join_planes(codes, 4, 32)]
    return np.concatenate([head, *planes], axis=1).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = split_planes(blocks[:, 48:], 4, 32) | split_planes(blocks[:, 16:48], 1, 32) << 4
    scale, low = affine_scales(blocks[:, :16])
    return (scaled(codes, scale) - low[:, :, None]).reshape(len(packed), -1)


FORMAT = BlockFormat(
    "Q5_K", 13, SUPER, NBYTES, quantize, dequantize, half_scales=(0, 2), fallback="Q5_1"
)
