"""Q3_K: 256 weights as signed 3-bit codes, a signed 6-bit scale per 16; 3.4375 bits per weight.

======  =====  =========================================================================
offset  bytes  content
======  =====  =========================================================================
0       32     bit 2 of the codes: bit b of byte i belongs to weight 32*b + i
32      64     bits 0-1: byte i of each 32 holds weights i, i+32, i+64, i+96 of its 128
96      8      low nibbles of the scales: byte j holds sub-blocks j (low) and j+8 (high)
104     4      high bits: two of byte j each for sub-blocks j, j+4, j+8 and j+12
108     2      ``d``, float16
======  =====  =========================================================================

A weight is ``d * (scale - 32) * (code - 4)``. Without importance weights the codes are improved in
sweeps and the scales rounded to the largest; with them both are searched. Mirrors
``quantize_row_q3_K_ref`` and ``quantize_row_q3_K_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.kquants import (
    SUPER,
    join_planes,
    round_symmetric,
    scaled,
    split_planes,
    super_importance,
)
from quantcli.formats.ksearch import sweep_symmetric
from quantcli.formats.search import (
    Codes,
    from_halves,
    halves,
    nearest,
    ordered_sum,
    search_symmetric,
    signed_peak,
)

NBYTES = 110


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    subs = rows.reshape(-1, 16)
    if importance is None:
        scale, found = sweep_symmetric(subs, 4)
        d, scales = _round_scales(scale.reshape(-1, 16))
    else:
        weights = super_importance(rows, importance, 2).reshape(-1, 16)
        scale, found = search_symmetric(subs, weights, 4)
        with np.errstate(all="ignore"):
            total = ordered_sum(weights).reshape(-1, 16)
        d, scales = search_symmetric(scale.reshape(-1, 16), total, 32)
    half = halves(d)
    codes = round_symmetric(rows, _scale(scales, half), found, 4)
    planes = [join_planes(codes >> 2, 1, 32), join_planes(codes, 2, 32)]
    nibbles = [join_planes(scales, 4, 8), join_planes(scales >> 4, 2, 4)]
    return np.concatenate([*planes, *nibbles, half], axis=1).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = split_planes(blocks[:, 32:96], 2, 32) | split_planes(blocks[:, :32], 1, 32) << 2
    scales = split_planes(blocks[:, 96:104], 4, 8) | split_planes(blocks[:, 104:108], 2, 4) << 4
    return scaled(codes - 4, _scale(scales, blocks[:, 108:])).reshape(len(packed), -1)


def _round_scales(scale: Floats) -> tuple[Floats, Codes]:
    """The scale of largest magnitude becomes -32; a code passes through a signed byte."""
    peak = signed_peak(scale)
    with np.errstate(all="ignore"):
        inverse = np.float32(-32) / peak
        codes = nearest(inverse[:, None] * scale).astype(np.int8).astype(np.int32)
        d = np.where(peak != 0, np.float32(1) / inverse, np.float32(0))
    return d, np.where(peak[:, None] != 0, np.clip(codes, -32, 31) + 32, 0)


def _scale(scales: Codes, half: Bytes) -> Floats:
    with np.errstate(invalid="ignore"):
        values: Floats = from_halves(half, 0) * (scales - 32).astype(np.float32)
    return values


FORMAT = BlockFormat(
    "Q3_K", 11, SUPER, NBYTES, quantize, dequantize, half_scales=(108,), fallback="Q4_0"
)
