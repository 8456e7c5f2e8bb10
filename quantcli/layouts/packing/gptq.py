"""GPTQ: the matrix transposed, dense words along the inputs; zero points along the outputs.

``checkpoint_format`` "gptq" (version 1) stores each zero point less one, so that it can say 1 to
2^bits; "gptq_v2" stores it as it is, 0 to 2^bits - 1. Sources: AutoGPTQ's and GPTQModel's
``pack`` for their torch linear layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.layouts.packing.bits import WORD, Codes, pack_bits, unpack_bits

Ints = NDArray[np.int32]

BITS = (2, 3, 4, 8)
"""What the layout is defined for."""
STORED_LESS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` -> how much less than the zero point is stored."""


def pack_codes(codes: Codes, bits: int) -> Ints:
    """``qweight``: int32 (in * bits / 32, out) of codes (out, in)."""
    return np.ascontiguousarray(pack_bits(codes, bits).T).view(np.int32)


def unpack_codes(qweight: Ints, bits: int) -> Codes:
    """Codes (out, in) of ``qweight`` (in * bits / 32, out)."""
    return unpack_bits(qweight.T, bits, qweight.shape[0] * WORD // bits)


def pack_zeros(zeros: NDArray[Any], bits: int, layout: str) -> Ints:
    """``qzeros``: int32 (groups, out * bits / 32) of zero points (out, groups).

    ``layout`` is a key of `STORED_LESS`; ValueError for a zero point that it cannot say.
    """
    stored = zeros.T.astype(np.int32) - STORED_LESS[layout]
    if stored.size and (stored.min() < 0 or stored.max() >> bits):
        raise ValueError(f"{layout} does not hold zero points {zeros.min()} to {zeros.max()}")
    return pack_bits(stored, bits).view(np.int32)


def unpack_zeros(qzeros: Ints, bits: int, layout: str) -> NDArray[np.int32]:
    """Zero points (out, groups) of ``qzeros`` (groups, out * bits / 32)."""
    stored = unpack_bits(qzeros, bits, qzeros.shape[1] * WORD // bits)
    return np.ascontiguousarray(stored.T.astype(np.int32) + STORED_LESS[layout])
