"""The searches that only the K-quants have, in strict float32: see `quantcli.formats.search`.

A super-block's scales are themselves rounded to 4 or 6 bits. With importance weights that rounding
is a search too (`search_positive`); Q3_K without them refines its codes one by one
(`sweep_symmetric`). Axis 0 is independent groups, axis 1 is taken in order.

Source: ``make_qp_quants`` and ``make_q3_quants`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import Floats
from quantcli.formats.search import ALL_ZERO, Codes, nearest, ordered_sum, signed_peak

_SWEEPS = 5


def largest(values: Floats) -> Floats:
    """The largest above zero of each group, or 0; NaN does not count. Shape (n, k) gives (n,)."""
    top = np.fmax.reduce(values, axis=1)
    return np.where(top > 0, top, np.float32(0))


def round_to_largest(values: Floats, top: int) -> tuple[Floats, Codes]:
    """The scale, shape (n,), that makes each group's largest value ``top``; codes as bytes."""
    peak = largest(values)
    with np.errstate(all="ignore"):
        inverse = np.where(peak > 0, np.float32(top) / peak, np.float32(0))
        codes = np.where(peak[:, None] > 0, nearest(inverse[:, None] * values) & 255, 0)
    return peak / np.float32(top), codes


def search_positive(x: Floats, weights: Floats, nmax: int) -> tuple[Floats, Codes]:
    """Scale and codes ``0 .. nmax`` of groups of values that are not negative: ``make_qp_quants``.

    ``x`` and ``weights`` have shape (n, k). Nine scales are tried for the least weighted squares,
    then the codes are improved in turn. A negative value's code wraps round in a byte, as in ggml.
    """
    with np.errstate(all="ignore"):
        return _search_positive(x, weights, nmax)


def _search_positive(x: Floats, w: Floats, nmax: int) -> tuple[Floats, Codes]:
    top = np.zeros(len(x), np.float32)
    for column in x.T:
        top = np.where(top > column, top, column)
    zero = top < ALL_ZERO

    def error(scale: Floats, codes: Codes) -> Floats:
        diff = x - scale[:, None] * codes.astype(np.float32)
        return ordered_sum(w * diff * diff)

    inverse = np.float32(nmax) / top
    best = error(np.float32(1) / inverse, nearest(inverse[:, None] * x) & 255)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = (np.float32(0.1) * np.float32(step) + np.float32(nmax)) / top
        codes = np.minimum(nearest(trial[:, None] * x), nmax)
        found = error(np.float32(1) / trial, codes)
        inverse = np.where(found < best, trial, inverse)
        best = np.where(found < best, found, best)

    codes = np.minimum(nearest(inverse[:, None] * x), nmax)
    level = codes.astype(np.float32)
    sum_xl, sum_l2 = ordered_sum(w * x * level), ordered_sum(w * level * level)
    codes &= 255
    for _ in range(_SWEEPS):
        changed = np.zeros(len(x), bool)
        for i in range(x.shape[1]):
            xi, wi, old = x[:, i], w[:, i], codes[:, i].astype(np.float32)
            other_xl, other_l2 = sum_xl - wi * xi * old, sum_l2 - wi * old * old
            best_level: Floats = np.divide(xi * other_l2, other_xl)
            code = np.minimum(nearest(best_level), nmax)
            new = code.astype(np.float32)
            new_xl, new_l2 = other_xl + wi * xi * new, other_l2 + wi * new * new
            better = (other_xl > 0) & (other_l2 > 0) & (code != codes[:, i])
            better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            codes[:, i] = np.where(better, code & 255, codes[:, i])
            sum_xl, sum_l2 = np.where(better, new_xl, sum_xl), np.where(better, new_l2, sum_l2)
            changed |= better
        if not changed.any():
            break
    scale = np.where(sum_l2 > 0, sum_xl / sum_l2, np.float32(0))
    return np.where(zero, np.float32(0), scale), np.where(zero[:, None], 0, codes)


def sweep_symmetric(x: Floats, nmax: int) -> tuple[Floats, Codes]:
    """Scale and codes ``0 .. 2*nmax-1`` of each group, weights x^2: ``make_q3_quants``.

    After plain rounding each code in turn becomes the best one given all others, in up to five
    sweeps. All-zero groups get scale 0 and codes 0.
    """
    with np.errstate(all="ignore"):
        return _sweep_symmetric(x, nmax)


def _sweep_symmetric(x: Floats, nmax: int) -> tuple[Floats, Codes]:
    peak = signed_peak(x)
    zero = np.abs(peak) < ALL_ZERO
    w = x * x
    wx = w * x
    inverse = np.float32(-nmax) / peak
    level = np.clip(nearest(inverse[:, None] * x), -nmax, nmax - 1).astype(np.float32)
    sum_xl, sum_l2 = ordered_sum(wx * level), ordered_sum(w * level * level)
    for _ in range(_SWEEPS):
        changed = np.zeros(len(x), bool)
        for i in range(x.shape[1]):
            old = level[:, i]
            other_xl, other_l2 = sum_xl - wx[:, i] * old, sum_l2 - w[:, i] * old * old
            best_level: Floats = np.divide(x[:, i] * other_l2, other_xl)
            new = np.clip(nearest(best_level), -nmax, nmax - 1).astype(np.float32)
            new_xl, new_l2 = other_xl + wx[:, i] * new, other_l2 + w[:, i] * new * new
            better = (other_xl > 0) & (new != old) & (new_l2 > 0)
            better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            level[:, i] = np.where(better, new, old)
            sum_xl, sum_l2 = np.where(better, new_xl, sum_xl), np.where(better, new_l2, sum_l2)
            changed |= better
        if not changed.any():
            break
    scale = np.where(sum_l2 > 0, sum_xl / sum_l2, np.float32(0))
    codes = level.astype(np.int32) + nmax
    return np.where(zero, np.float32(0), scale), np.where(zero[:, None], 0, codes)
