"""MXFP4: 32 weights as four-bit floats (E2M1) under a power of two (E8M0); 4.25 bits per weight.

======  =====  ==========================================================
offset  bytes  content
======  =====  ==========================================================
0       1      ``e``, the scale's exponent, biased by 127
1       16     codes: byte j holds weight j (low) and weight j+16 (high)
======  =====  ==========================================================

A weight is ``value(code) * 2^(e - 128)`` with the doubled values of `microscale`. The exponent is
two below the largest magnitude's, so that the largest value is between 4 and 8 (6 is the last one).
Below 2^-125 the reference's exponent wraps around, harmlessly (all codes are 0) but for 255, which
is not a number: llama.cpp refuses such a block, and `quantcli.formats.native` does too.
Importance weights do not apply. Mirrors ``quantize_row_mxfp4_ref``; the scale is that of the OCP
Microscaling Formats specification, version 1.0.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.legacy import join_nibbles, split_nibbles
from quantcli.formats.microscale import VALUES, nearest_codes

BLOCK, NBYTES = 32, 17


def _exponents(peak: Floats) -> Bytes:
    """Biased exponents, shape (n,); log2 is rounded to float32 before it is rounded down."""
    with np.errstate(divide="ignore"):
        logarithm = np.log2(peak.astype(np.float64)).astype(np.float32)
    exponent = np.where(peak > 0, np.floor(logarithm) + 125, 0)
    return exponent.astype(np.int32).astype(np.uint8)


def _scales(exponents: Bytes) -> Floats:
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    blocks = rows.reshape(-1, BLOCK)
    exponents = _exponents(np.abs(blocks).max(axis=1))
    codes = nearest_codes(blocks, _scales(exponents))
    packed = np.concatenate([exponents[:, None], join_nibbles(codes)], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    with np.errstate(over="ignore"):
        values = VALUES[split_nibbles(blocks[:, 1:])] * _scales(blocks[:, 0])[:, None]
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat("MXFP4", 39, BLOCK, NBYTES, quantize, dequantize, byte_scales=(0,))
