"""Q6_K: 256 weights as signed 6-bit codes, a signed 8-bit scale per 16; 6.5625 bits per weight.

======  =====  ========================================================================
offset  bytes  content
======  =====  ========================================================================
0       128    low nibbles: byte i of each 64 holds weights i (low) and i+64 of its 128
128     64     bits 4-5: byte i of each 32 holds weights i, i+32, i+64, i+96 of its 128
192     16     scales of the sub-blocks of 16, int8
208     2      ``d``, float16
======  =====  ========================================================================

A weight is ``d * scale * (code - 32)``. The scale of largest magnitude becomes -128. Importance
weights are used as they are, without them a weight counts by its square. Mirrors
``quantize_row_q6_K_ref`` and ``quantize_row_q6_K_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.kquants import SUPER, join_planes, round_symmetric, scaled, split_planes
from quantcli.formats.search import (
    ALL_ZERO,
    from_halves,
    halves,
    nearest,
    search_symmetric,
    signed_peak,
)

NBYTES = 210


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    subs = rows.reshape(-1, 16)
    weights = None
    if importance is not None:
        weights = np.broadcast_to(importance, rows.shape).reshape(-1, 16)
    scale, found = search_symmetric(subs, weights, 32)
    scale = scale.reshape(-1, 16)
    peak = signed_peak(scale)
    empty = np.abs(peak) < ALL_ZERO
    with np.errstate(all="ignore"):
        inverse = np.float32(-128) / peak
        d = halves(np.where(empty, np.float32(0), np.float32(1) / inverse))
        scales = np.minimum(nearest(inverse[:, None] * scale), 127).astype(np.int8)
    codes = round_symmetric(rows, _scale(scales.view(np.uint8), d), found, 32)
    planes = [join_planes(codes, 4, 64), join_planes(codes >> 4, 2, 32)]
    packed = np.concatenate([*planes, scales.view(np.uint8), d], axis=1)
    return np.where(empty[:, None], np.uint8(0), packed).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = split_planes(blocks[:, :128], 4, 64) | split_planes(blocks[:, 128:192], 2, 32) << 4
    scale = _scale(blocks[:, 192:208], blocks[:, 208:])
    return scaled(codes - 32, scale).reshape(len(packed), -1)


def _scale(scales: Bytes, half: Bytes) -> Floats:
    with np.errstate(invalid="ignore"):
        values: Floats = from_halves(half, 0) * scales.view(np.int8).astype(np.float32)
    return values


FORMAT = BlockFormat(
    "Q6_K", 14, SUPER, NBYTES, quantize, dequantize, half_scales=(208,), fallback="Q8_0"
)
