"""Q2_K: 256 weights as 2-bit codes, a 4-bit scale and minimum per 16; 2.625 bits per weight.

======  =====  =====================================================================
offset  bytes  content
======  =====  =====================================================================
0       16     per sub-block of 16: scale (low nibble) and minimum (high nibble)
16      64     codes: byte i of each 32 holds weights i, i+32, i+64, i+96 of its 128
80      2      ``d``, float16
82      2      ``dmin``, float16
======  =====  =====================================================================

A weight is ``d * scale * code - dmin * minimum``. Mirrors ``quantize_row_q2_K_ref`` and
``quantize_row_q2_K_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.kquants import (
    SUPER,
    AffineType,
    join_planes,
    round_affine,
    scaled,
    search_affine_blocks,
    split_planes,
)
from quantcli.formats.search import from_halves, halves

NBYTES = 84
_TYPE = AffineType(length=16, top=3, scale_top=15, trials=(-0.5, 0.1, 15), factor=1)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    found = search_affine_blocks(rows, importance, _TYPE)
    d, dmin = halves(found.d), halves(found.dmin)
    scales = ((found.scales | found.mins << 4) & 255).astype(np.uint8)
    codes = round_affine(rows, *_scales(scales, d, dmin), found.codes, 3)
    packed = np.concatenate([scales, join_planes(codes, 2, 32), d, dmin], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    scale, low = _scales(blocks[:, :16], blocks[:, 80:82], blocks[:, 82:84])
    values = scaled(split_planes(blocks[:, 16:80], 2, 32), scale) - low[:, :, None]
    return values.reshape(len(packed), -1)


def _scales(packed: Bytes, d: Bytes, dmin: Bytes) -> tuple[Floats, Floats]:
    """Scale and minimum of each sub-block, float32 of shape (n, 16)."""
    with np.errstate(invalid="ignore"):
        scale = from_halves(d, 0) * (packed & 15).astype(np.float32)
        low = from_halves(dmin, 0) * (packed >> 4).astype(np.float32)
    return scale, low


FORMAT = BlockFormat(
    "Q2_K", 10, SUPER, NBYTES, quantize, dequantize, half_scales=(80, 82), fallback="Q4_0"
)
