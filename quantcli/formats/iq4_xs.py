"""IQ4_XS: IQ4_NL's levels, with 6-bit scales for eight blocks under one float16 scale; 4.25 bits.

======  =====  ===============================================================
offset  bytes  content (256 weights)
======  =====  ===============================================================
0       2      ``d``, float16
2       2      high two bits of the block scales, two bits each
4       4      low four bits of the block scales, two to a byte
8       128    codes, 16 bytes per block of 32, as in IQ4_NL
======  =====  ===============================================================

A weight is ``LEVELS[code] * (scale - 32) * d``. Blocks are searched as in IQ4_NL; the codes are
then rounded under the scale that was stored, but for ``d``, which is taken before it becomes a
float16. Mirrors ``quantize_row_iq4_nl_impl``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.iq4_nl import LEVELS, encode, search_scale, search_weights
from quantcli.formats.legacy import inverse_of, join_nibbles, split_nibbles
from quantcli.formats.search import Codes, from_halves, halves, nearest

SUPER, BLOCK, NBYTES = 256, 32, 136
_PARTS = SUPER // BLOCK
_HIGH_SHIFTS = 2 * np.arange(_PARTS, dtype=np.int32)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    scales = search_scale(blocks, search_weights(rows, importance, SUPER)).reshape(-1, _PARTS)
    d = -_largest(scales) / np.float32(32)
    with np.errstate(all="ignore"):
        coded = np.clip(nearest(inverse_of(d)[:, None] * scales), -32, 31)
        rounded = (d[:, None] * coded.astype(np.float32)).reshape(-1)
    codes = join_nibbles(encode(blocks, rounded)).reshape(len(scales), -1)
    packed = np.concatenate([halves(d), join_scales(coded + 32), codes], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    scales = from_halves(blocks, 0) * (split_scales(blocks) - 32).astype(np.float32)
    values = LEVELS[split_nibbles(blocks[:, 8:].reshape(-1, BLOCK // 2))]
    return (scales.reshape(-1, 1) * values).reshape(len(packed), -1)


def _largest(scales: Floats) -> Floats:
    """The (first) scale of largest magnitude in each row, NaN passed over; 0 when there is none."""
    magnitude = np.where(np.isnan(scales), np.float32(0), np.abs(scales))
    first = magnitude.argmax(axis=1)[:, None]
    found = np.take_along_axis(scales, first, axis=1)[:, 0]
    return np.where(magnitude.max(axis=1) > 0, found, np.float32(0))


def join_scales(scales: Codes) -> Bytes:
    """Six bytes for eight scales of 0 .. 63: the high bits, then the low ones."""
    high = ((scales >> 4) << _HIGH_SHIFTS).sum(axis=1, dtype=np.int32)
    low = (scales[:, 0::2] & 15) | (scales[:, 1::2] & 15) << 4
    return np.concatenate([high[:, None] & 255, high[:, None] >> 8, low], axis=1).astype(np.uint8)


def split_scales(blocks: Bytes) -> Codes:
    """The inverse of `join_scales`, from whole blocks."""
    high = blocks[:, 2].astype(np.int32) | blocks[:, 3].astype(np.int32) << 8
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, _PARTS)
    return low.astype(np.int32) | (high[:, None] >> _HIGH_SHIFTS & 3) << 4


FORMAT = BlockFormat(
    "IQ4_XS", 23, SUPER, NBYTES, quantize, dequantize, half_scales=(0,), fallback="IQ4_NL"
)
