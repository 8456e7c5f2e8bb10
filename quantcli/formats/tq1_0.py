"""TQ1_0: 256 trits, five in a byte, under one float16 scale; 1.6875 bits per weight.

======  =====  =======================================================================
offset  bytes  content
======  =====  =======================================================================
0       32     byte j holds weights j, j+32, j+64, j+96 and j+128
32      16     byte j holds weights 160+j, 176+j, 192+j, 208+j and 224+j
48      4      byte j holds weights 240+j, 244+j, 248+j and 252+j
52      2      ``d``, float16
======  =====  =======================================================================

A weight is ``(trit - 1) * d``, and ``d`` is the block's largest magnitude. A byte is the number
whose base-3 digits are its trits, the first one highest, as a fraction of 243 in 256ths, rounded
up: multiplying by 3 then carries the next trit out of eight bits. Importance weights do not apply.
Mirrors ``quantize_row_tq1_0_ref``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.search import Codes, from_halves, halves
from quantcli.formats.ternary import ternary_codes

BLOCK, NBYTES = 256, 54
_RUNS = ((0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4))
"""First weight, first byte, bytes, and trits in each of these bytes."""
_POWERS = 3 ** np.arange(5)


def _packed_run(trits: Codes) -> Bytes:
    """Bytes, shape (n, width), of trits of shape (n, trits in a byte, width)."""
    powers = _POWERS[::-1][: trits.shape[1], None]
    number: NDArray[np.int64] = (trits * powers).sum(axis=1)
    return ((number * 256 + 242) // 243).astype(np.uint8)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    scale, codes = ternary_codes(blocks, uninvertible=1)
    return np.concatenate([join_trits(codes), halves(scale)], axis=1).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    values = (split_trits(blocks) - 1).astype(np.float32) * from_halves(blocks, 52)
    return values.reshape(len(packed), -1)


def join_trits(codes: Codes) -> Bytes:
    """52 bytes per block of its 256 codes 0, 1 and 2."""
    runs = [
        _packed_run(codes[:, first : first + count * width].reshape(-1, count, width))
        for first, _, width, count in _RUNS
    ]
    return np.concatenate(runs, axis=1)


def split_trits(blocks: Bytes) -> Codes:
    """The inverse of `join_trits`: 256 codes per block."""
    runs = []
    for _, place, width, count in _RUNS:
        fractions = blocks[:, None, place : place + width] * _POWERS[:count, None] & 0xFF
        runs.append((fractions * 3 >> 8).reshape(len(blocks), -1))
    return np.concatenate(runs, axis=1).astype(np.int32)


FORMAT = BlockFormat(
    "TQ1_0", 34, BLOCK, NBYTES, quantize, dequantize, half_scales=(52,), fallback="Q4_0"
)
