"""The float16 scales and minimums of packed blocks.

Of most block formats a weight is linear in one or two float16 numbers that its block holds: a
scale, and a minimum. They can be moved while all codes stay, and no byte is added. IQ1_M has its
float16 in four pieces; a format whose scale is none (MXFP4, NVFP4) has no factor.

A weight's derivative by a factor is found by decoding the block with that factor one and the other
zero, so no format needs its own code here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantcli.formats import iq1_m, native
from quantcli.formats.base import BlockFormat, Bytes, Floats

Halves = NDArray[np.float16]

LARGEST = 65504.0
"""Of float16."""


def count_factors(fmt: BlockFormat) -> int:
    """How many factors a block has, 0 for a float type."""
    if fmt.name == iq1_m.FORMAT.name:
        return 1
    return len(fmt.half_scales) if fmt.block > 1 else 0


def read_factors(fmt: BlockFormat, packed: Bytes) -> Halves:
    """Factors of packed rows, float16 of shape (n, blocks, factors)."""
    blocks = packed.reshape(len(packed), -1, fmt.nbytes)
    if fmt.name == iq1_m.FORMAT.name:
        return iq1_m.read_halves(blocks.reshape(-1, fmt.nbytes)).reshape(*blocks.shape[:2], 1)
    parts = [np.ascontiguousarray(blocks[:, :, i : i + 2]) for i in fmt.half_scales]
    return np.concatenate([part.view("<f2") for part in parts], axis=2)


def write_factors(fmt: BlockFormat, packed: Bytes, factors: Halves) -> Bytes:
    """A copy of packed rows with other factors, as `read_factors` gives them."""
    blocks = packed.reshape(len(packed), -1, fmt.nbytes).copy()
    if fmt.name == iq1_m.FORMAT.name:
        iq1_m.write_halves(blocks.reshape(-1, fmt.nbytes), factors.reshape(-1))
    for number, place in enumerate(fmt.half_scales):
        part = np.ascontiguousarray(factors[:, :, number], "<f2")
        blocks[:, :, place : place + 2] = part[:, :, None].view(np.uint8)
    return blocks.reshape(packed.shape)


def factor_gradients(fmt: BlockFormat, packed: Bytes, gradient: Floats) -> Floats:
    """Gradients by factors, float32 (n, blocks, factors), from those by weights (n, columns)."""
    shape = (len(packed), packed.shape[1] // fmt.nbytes, count_factors(fmt))
    found = np.empty(shape, np.float32)
    blocks = gradient.reshape(*shape[:2], fmt.block)
    for number in range(shape[2]):
        one = np.zeros(shape, np.float16)
        one[:, :, number] = 1
        share = native.decode(fmt, write_factors(fmt, packed, one)).reshape(blocks.shape)
        np.einsum("rbw,rbw->rb", blocks, share, out=found[:, :, number])
    return found
