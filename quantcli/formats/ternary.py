"""What the formats of one trit or two bits share: the peak as scale, and rounding to -1, 0 or 1.

Source: ``quantize_row_tq1_0_ref``, ``quantize_row_tq2_0_ref`` and ``quantize_row_q2_0_ref`` of
ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import Floats
from quantcli.formats.legacy import inverse_of
from quantcli.formats.search import Codes


def ternary_codes(blocks: Floats, uninvertible: int) -> tuple[Floats, Codes]:
    """Scale, shape (n,), and codes 0, 1, 2 for -1, 0, 1, shape (n, k), of blocks (n, k).

    The scale is the largest magnitude and halves round away from zero. A scale too small to invert
    gives quotients that no integer can hold; all codes are then ``uninvertible``, which is what
    the reference's conversion makes of them on x86.
    """
    scale: Floats = np.abs(blocks).max(axis=1)
    inverse = inverse_of(scale)[:, None]
    with np.errstate(all="ignore"):
        scaled = blocks * inverse
    codes = (scaled > np.float32(-0.5)).astype(np.int32) + (scaled >= np.float32(0.5))
    return scale, np.where(np.isinf(inverse), np.int32(uninvertible), codes)
