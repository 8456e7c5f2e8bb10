"""NVFP4: 64 weights as four-bit floats (E2M1), each 16 under an 8-bit float; 4.5 bits per weight.

======  =====  =====================================================================
offset  bytes  content
======  =====  =====================================================================
0       4      scales of weights 0 to 15, 16 to 31, 32 to 47 and 48 to 63, UE4M3
4       32     codes: byte 8g+j holds weight 16g+j (low) and weight 16g+j+8 (high)
======  =====  =====================================================================

A weight is ``value(code) * scale / 2`` with the doubled values of `microscale`. UE4M3 is an
unsigned float of four exponent bits (bias 7) and three mantissa bits, at most 448; 0x7f reads as
zero. The scale that brings the largest magnitude to 6 is rounded half up; from 256 upwards the
reference takes 448, and weights beyond 6 * 448 it clips (far beyond, it stores 0), which
`quantcli.formats.native` refuses. There is no scale per tensor, and the least group scale is 2^-9:
groups whose largest magnitude is below 6 * 2^-10 (0.0059) become zeros. Rows that 64 does not
divide have no other format to go to: llama.cpp stops there, and so do we. Importance weights do
not apply. Mirrors ``quantize_row_nvfp4_ref``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.microscale import VALUES, nearest_codes
from quantcli.formats.search import Codes

BLOCK, NBYTES = 64, 36
GROUP, GROUPS = 16, 4
LARGEST = 2688.0
"""6 * 448: what the largest code under the largest scale holds."""


def _scale_codes(target: Floats) -> Bytes:
    """UE4M3 codes, shape (n,), of scales that are not negative (``ggml_fp32_to_ue4m3``)."""
    bits = target.view(np.int32)
    exponent = (bits >> 23) - 120
    with np.errstate(over="ignore"):
        subnormal = np.minimum(target * np.float32(512) + np.float32(0.5), np.float32(7))
    normal = (bits >> 20) - (120 << 3) + (bits >> 19 & 1)
    normal = np.where(normal >= 15 << 3, 0x7E, normal)
    return np.where(exponent <= 0, subnormal.astype(np.int32), normal).astype(np.uint8)


def scales(codes: Bytes) -> Floats:
    """Half of what UE4M3 codes stand for; the highest bit does not count."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    fraction = np.where(exponent == 0, mantissa, mantissa + np.float32(8))
    values = np.ldexp(fraction, np.maximum(exponent, 1) - 11)
    halved: Floats = np.where(codes == 0x7F, np.float32(0), values)
    return halved


def join_codes(codes: Codes) -> Bytes:
    """32 bytes per block of the codes of its groups, shape (groups, 16)."""
    halves = codes.reshape(-1, 2, GROUP // 2)
    return (halves[:, 0] | halves[:, 1] << 4).astype(np.uint8).reshape(-1, BLOCK // 2)


def split_codes(blocks: Bytes) -> Codes:
    """The inverse of `join_codes`: codes of shape (groups, 16)."""
    pairs = blocks[:, GROUPS:].reshape(-1, GROUP // 2)
    return np.concatenate([pairs & 15, pairs >> 4], axis=1).astype(np.int32)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    groups = rows.reshape(-1, GROUP)
    scale_codes = _scale_codes(np.abs(groups).max(axis=1) / np.float32(6))
    codes = nearest_codes(groups, scales(scale_codes))
    packed = np.concatenate([scale_codes.reshape(-1, GROUPS), join_codes(codes)], axis=1)
    return packed.reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    codes = split_codes(blocks)
    values: Floats = VALUES[codes] * scales(blocks[:, :GROUPS].reshape(-1))[:, None]
    return values.reshape(len(packed), -1)


FORMAT = BlockFormat(
    "NVFP4", 40, BLOCK, NBYTES, quantize, dequantize,
    byte_scales=(0, 1, 2, 3), holds=LARGEST,
)  # fmt: skip
