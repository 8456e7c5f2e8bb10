"""The range of a static int8 scale with the least squared error of what was seen of activations.

Codes are those of compressed-tensors: -128 to 127, the largest magnitude at 127.5 where there is no
zero point. A narrower range than the extremes clips a few values and rounds all others more finely;
factors of an eighth of an octave are tried for it, for both ends in turns where there is one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantcli.layouts.base import Extremes
from quantcli.statistics.input_histogram import bin_values

_FACTORS = np.exp2(-np.arange(49) / 8)
_LOW, _HIGH = -128, 127
_TURNS = 3


def narrow(histogram: NDArray[np.float64], seen: Extremes, *, symmetric: bool) -> Extremes:
    """The range, within the extremes that were ``seen``, for a histogram of the values."""
    held = histogram > 0
    weights, values = histogram[held], bin_values()[held]
    # The ends of a bin may be beyond what was seen in it.
    values = np.clip(values, seen.low, seen.high)
    if symmetric:
        return _best([Extremes(-seen.largest * f, seen.largest * f) for f in _FACTORS],
                     weights, values, symmetric=True)  # fmt: skip
    best = seen
    for _ in range(_TURNS):
        lows = [Extremes(seen.low * f, best.high) for f in _FACTORS]
        best = _best([best, *lows], weights, values, symmetric=False)
        highs = [Extremes(best.low, seen.high * f) for f in _FACTORS]
        best = _best([best, *highs], weights, values, symmetric=False)
    return best


def _best(
    tried: list[Extremes], weights: NDArray[np.float64], values: NDArray[np.float64], *,
    symmetric: bool,
) -> Extremes:  # fmt: skip
    errors = [_error(each, weights, values, symmetric=symmetric) for each in tried]
    return tried[int(np.argmin(errors))]


def _error(
    span: Extremes, weights: NDArray[np.float64], values: NDArray[np.float64], *, symmetric: bool
) -> float:
    width = 2 * span.largest if symmetric else span.high - span.low
    if not width > 0:
        return float("inf")
    scale = width / (_HIGH - _LOW)
    zero = 0.0 if symmetric else float(np.clip(np.rint(_LOW - span.low / scale), _LOW, _HIGH))
    codes = np.clip(np.rint(values / scale + zero), _LOW, _HIGH)
    missed = (codes - zero) * scale - values
    return float(weights @ np.square(missed).mean(1))
