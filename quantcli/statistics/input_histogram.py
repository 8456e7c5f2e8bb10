"""How the values of a matrix's inputs are spread, so that a static scale can be chosen for them.

A histogram counts values by sign and magnitude: sixteen bins of equal width from each power of two
to the next, between 2^-20 and 2^20; what is smaller counts in the first bin, what is larger in the
last. Each token's values count by the inverse of its sum of squares, so that the squared error that
a histogram tells is the mean over tokens of each one's error relative to its own size. Layers
divide by a token's size (RMSNorm) after what they add, so a few tokens of enormous values, such as
the first of a text, would otherwise decide alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEPS = 16
_LOWEST, _HIGHEST = -20, 20
_SIDE = (_HIGHEST - _LOWEST) * _STEPS
BINS = 2 * _SIDE
"""Those of values from zero on, then those below."""
_MANTISSA_BITS = 19
"""Bits of a float32 below those that tell its bin."""
_PARTS = 4
"""Values by which a bin is judged."""


def count_values(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """The histogram of tokens' values (tokens, columns), float64 of shape (BINS,)."""
    rows = np.ascontiguousarray(rows, np.float32)
    bits = rows.view(np.uint32)
    places = ((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(_MANTISSA_BITS)).astype(np.int64)
    places -= (127 + _LOWEST) * _STEPS
    np.clip(places, 0, _SIDE - 1, out=places)
    places += (bits >> np.uint32(31)).astype(np.int64) * _SIDE
    places += np.arange(len(rows))[:, None] * BINS
    counts = np.bincount(places.reshape(-1), minlength=len(rows) * BINS).reshape(len(rows), BINS)
    with np.errstate(all="ignore"):
        shares = 1 / np.square(rows, dtype=np.float64).sum(1)
    shares[~np.isfinite(shares)] = 0
    found: NDArray[np.float64] = (shares[:, None] * counts).sum(0)
    return found


def bin_values() -> NDArray[np.float64]:
    """Values that stand for the bins', shape (BINS, _PARTS), spread over each evenly."""
    index = np.arange(_SIDE)
    power = np.exp2(_LOWEST + index // _STEPS)
    shares = (np.arange(_PARTS) + 0.5) / _PARTS
    side = power[:, None] * (1 + (index % _STEPS)[:, None] / _STEPS + shares / _STEPS)
    # Zeros are most of the first bin.
    side[0] = 0
    return np.concatenate([side, -side])
