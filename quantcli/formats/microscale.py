"""Four-bit floats (E2M1): what MXFP4 and NVFP4 share.

A code is a sign bit above two exponent bits and one mantissa bit. The values are doubled here, as
in ggml, so that they are whole; the scales are halved in exchange.

Source: ``kvalues_mxfp4`` of ggml-common.h and ``best_index_mxfp4`` of ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import Floats
from quantcli.formats.search import Codes

_MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)
VALUES: Floats = np.array([*_MAGNITUDES, *(-v for v in _MAGNITUDES)], np.float32) + np.float32(0)
"""Each code's value; code 8, minus zero, reads as zero."""


def nearest_codes(groups: Floats, scale: Floats) -> Codes:
    """Codes, shape (n, k), of groups (n, k) under scales (n,).

    The value with the least error in float32, and the first of several: far above the largest
    value all errors are equal, and the code is 0.
    """
    best = np.zeros(groups.shape, np.int32)
    least = np.abs(groups)
    with np.errstate(over="ignore"):
        for code, value in enumerate(VALUES):
            error = np.abs(value * scale[:, None] - groups)
            better = error < least
            best[better] = code
            least = np.where(better, error, least)
    return best
