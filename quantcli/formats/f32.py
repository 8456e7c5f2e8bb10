"""F32: weights as they are, IEEE 754 binary32, little-endian; 32 bits per weight."""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import BlockFormat, Bytes, Floats


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """The rows' own bytes; importance weights do not apply."""
    return np.ascontiguousarray(rows, dtype="<f4").view(np.uint8)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    return np.ascontiguousarray(packed).view("<f4").astype(np.float32)


FORMAT = BlockFormat("F32", 0, 1, 4, quantize, dequantize)
