"""MLX's affine mode: dense words along each row, of a matrix or of a stack of them.

Source: ``mlx.core.quantize``; its three bytes for eight 3-bit or four 6-bit codes, and five for
eight 5-bit codes, are the same stream.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantcli.layouts.packing.bits import WORD, Codes, Words, pack_bits, unpack_bits

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def pack_codes(codes: Codes, bits: int) -> Words:
    """``weight``: uint32 (..., out, in * bits / 32) of codes (..., out, in)."""
    return pack_bits(codes, bits)


def unpack_codes(words: NDArray[np.uint32], bits: int) -> Codes:
    """Codes (..., out, in) of ``weight`` (..., out, in * bits / 32)."""
    return unpack_bits(words, bits, words.shape[-1] * WORD // bits)
