"""BF16: the upper half of a binary32, little-endian, rounded to nearest even; 16 bits per weight.

Mirrors ``ggml_fp32_to_bf16_row_ref``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes); importance weights do not apply."""
    bits = np.ascontiguousarray(rows, dtype=np.float32).view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    return (rounded >> 16).astype("<u2").view(np.uint8)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    bits = np.ascontiguousarray(packed).view("<u2").astype(np.uint32)
    return (bits << 16).view(np.float32)


FORMAT = BlockFormat("BF16", 30, 1, 2, quantize, dequantize, half_scales=(0,))
