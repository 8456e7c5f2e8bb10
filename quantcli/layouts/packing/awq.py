"""AWQ's GEMM layout: the matrix transposed, eight outputs interleaved in a word, four bits each.

Nibble i of a word holds output ``ORDER[i]`` of its eight. Source: AutoAWQ's ``WQLinear_GEMM``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.layouts.packing.bits import WORD, Codes, pack_bits, unpack_bits

Ints = NDArray[np.int32]

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = WORD // BITS


def pack_codes(codes: NDArray[Any]) -> Ints:
    """``qweight``: int32 (in, out / 8) of codes (out, in); zero points are packed alike."""
    across = np.ascontiguousarray(codes.T)
    words = across.reshape(across.shape[0], -1, _PER_WORD)[..., list(ORDER)]
    return pack_bits(words.reshape(across.shape), BITS).view(np.int32)


def unpack_codes(qweight: Ints) -> Codes:
    """Codes (out, in) of ``qweight`` (in, out / 8)."""
    words = unpack_bits(qweight, BITS, qweight.shape[1] * _PER_WORD)
    across = np.empty_like(words)
    parts = words.reshape(words.shape[0], -1, _PER_WORD)
    across.reshape(parts.shape)[..., list(ORDER)] = parts
    return np.ascontiguousarray(across.T)


pack_zeros = pack_codes
"""``qzeros``: int32 (groups, out / 8) of zero points (out, groups)."""
unpack_zeros = unpack_codes
