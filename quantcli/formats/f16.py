"""F16: IEEE 754 binary16, little-endian, rounded to nearest even; 16 bits per weight.

Weights beyond 65504 do not fit: the encoder refuses them where llama.cpp writes infinities.
Mirrors ``ggml_fp32_to_fp16_row``.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes); importance weights do not apply."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rows.astype("<f2")).view(np.uint8)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    return np.ascontiguousarray(packed).view("<f2").astype(np.float32)


FORMAT = BlockFormat("F16", 1, 1, 2, quantize, dequantize, half_scales=(0,))
