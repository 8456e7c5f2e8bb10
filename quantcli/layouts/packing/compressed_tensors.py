"""compressed-tensors' pack-quantized: dense words along each row, zero points along the outputs.

The library stores signed codes shifted by half their range, which makes them ours. Rows whose
length does not fill the last word are padded. Source: ``pack_to_int32`` of compressed-tensors
0.20 (before its pull request 715, three-bit codes lay otherwise).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.layouts.packing.bits import Codes, pack_bits, unpack_bits

Ints = NDArray[np.int32]


def pack_codes(codes: Codes, bits: int) -> Ints:
    """``weight_packed``: int32 (out, words) of codes (out, in)."""
    return pack_bits(codes, bits).view(np.int32)


def unpack_codes(packed: Ints, bits: int, columns: int) -> Codes:
    """Codes (out, columns) of ``weight_packed`` (out, words)."""
    return unpack_bits(packed, bits, columns)


def pack_zeros(zeros: NDArray[Any], bits: int) -> Ints:
    """``weight_zero_point``: int32 (words, groups) of zero points (out, groups)."""
    return np.ascontiguousarray(pack_bits(zeros.T, bits).T).view(np.int32)


def unpack_zeros(packed: Ints, bits: int, rows: int) -> Codes:
    """Zero points (rows, groups) of ``weight_zero_point`` (words, groups)."""
    return np.ascontiguousarray(unpack_bits(packed.T, bits, rows).T)
