"""The two searches for a block's scale that ggml's encoders share, in strict float32.

Both fit ``code * scale (+ min)`` to the weights by trying a grid of scales, solving the weighted
least squares for each, and keeping the best. The sums run in element order and nothing is fused,
because the bytes must equal those of ggml's scalar code; so every function here works on many
blocks at once (axis 0) and along a block in order (axis 1).

Source: ``make_qx_quants``, ``make_qkx2_quants`` and ``make_qkx3_quants`` in ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Floats

Codes = NDArray[np.int32]

ALL_ZERO = np.float32(1e-15)
"""GROUP_MAX_EPS: a block whose largest magnitude is below it is stored as zeros."""


def nearest(values: Floats) -> Codes:
    """Nearest integers, ties to even: ggml's ``nearest_int``, wrap-around outside 2^22 included."""
    shifted = (values + np.float32(12582912.0)).astype(np.float32, copy=False)
    return (shifted.view(np.int32) & 0x007FFFFF) - 0x00400000


def ordered_sum(values: Floats) -> Floats:
    """Sums along axis 1 from a zero, one element after the other; shape (n, k) gives (n,)."""
    total: Floats = np.add.accumulate(values, axis=1, dtype=np.float32)[:, -1]
    return total + np.float32(0)  # a sum of negative zeros is a positive one


def signed_peak(values: Floats) -> Floats:
    """The value of largest magnitude of each block, the first of equals; NaN does not count."""
    size = np.where(np.isnan(values), np.float32(0), np.abs(values))
    peak = np.take_along_axis(values, size.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(size.max(axis=1) > 0, peak, np.float32(0))


def importance_weights(values: Floats, importance: Floats, sigma2: Floats) -> Floats:
    """Weights ``importance * sqrt(sigma2 + values^2)`` of the searches; ``sigma2`` broadcasts."""
    with np.errstate(all="ignore"):
        weights: Floats = importance * np.sqrt(sigma2 + values * values)
    return weights


def row_variance(rows: Floats) -> Floats:
    """Mean square of each row, shape (n, 1): the ``sigma2`` of the 32-weight formats."""
    with np.errstate(all="ignore"):
        return (ordered_sum(rows * rows) / np.float32(rows.shape[1]))[:, None]


def search_symmetric(x: Floats, weights: Floats | None, nmax: int) -> tuple[Floats, Codes]:
    """Scale and codes in ``0 .. 2*nmax-1`` (zero is ``nmax``) of each block: ``make_qx_quants``.

    ``x`` and ``weights`` have shape (blocks, k); ``weights=None`` weighs each value by its own
    square (``rmse_type`` 1). 19 scales are tried. All-zero blocks get scale 0 and codes 0.
    """
    with np.errstate(all="ignore"):
        return _search_symmetric(x, x * x if weights is None else weights, nmax)


def _search_symmetric(x: Floats, w: Floats, nmax: int) -> tuple[Floats, Codes]:
    wx = w * x
    top = signed_peak(x)
    zero = np.abs(top) < ALL_ZERO

    def fit(iscale: Floats) -> tuple[Codes, Floats, Floats]:
        codes = np.clip(nearest(iscale[:, None] * x), -nmax, nmax - 1)
        level = codes.astype(np.float32)
        return codes + nmax, ordered_sum(wx * level), ordered_sum(w * level * level)

    codes, sum_lx, sum_l2 = fit(np.float32(-nmax) / top)
    scale = np.where(sum_l2 != 0, sum_lx / sum_l2, np.float32(0))
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        trial, sum_lx, sum_l2 = fit(-(np.float32(nmax) + np.float32(0.1) * np.float32(step)) / top)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        codes = np.where(better[:, None], trial, codes)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best = np.where(better, scale * sum_lx, best)
    return np.where(zero, np.float32(0), scale), np.where(zero[:, None], 0, codes)


def search_affine(
    x: Floats,
    weights: Floats,
    nmax: int,
    *,
    rmin: float,
    rdelta: float,
    nstep: int,
    use_mad: bool = False,
) -> tuple[Floats, Floats, Codes]:
    """Scale, minimum (never above 0) and codes ``0 .. nmax`` of each block: ``make_qkx2``/``qkx3``.

    ``x`` and ``weights`` have shape (blocks, k). After the plain scale, ``nstep + 1`` scales
    ``(rmin + rdelta*step + nmax) / (max - min)`` are tried, each refitted by least squares and
    judged by the weighted square (``use_mad``: absolute) error. The minimum is returned as it is
    added, the negative of ggml's ``the_min``. As in ggml, a better minimum also shifts the trials
    that follow it.
    """
    with np.errstate(all="ignore"):
        return _search_affine(x, weights, nmax, rmin, rdelta, nstep, use_mad)


def _search_affine(
    x: Floats, w: Floats, nmax: int, rmin: float, rdelta: float, nstep: int, use_mad: bool
) -> tuple[Floats, Floats, Codes]:
    each = np.arange(len(x))
    # By position: of several zeros the first one gives its sign, which min() does not promise.
    top, low = x[each, x.argmax(axis=1)], x[each, x.argmin(axis=1)]
    low = np.where(low > 0, np.float32(0), low)
    flat = top == low
    flat_low = low
    sum_w: Floats = np.add.accumulate(w, axis=1)[:, -1]
    sum_x: Floats = np.add.accumulate(w * x, axis=1)[:, -1]

    def encode(iscale: Floats, minimum: Floats) -> Codes:
        return np.clip(nearest(iscale[:, None] * (x - minimum[:, None])), 0, nmax)

    def error(scale: Floats, codes: Codes, minimum: Floats) -> Floats:
        level = codes.astype(np.float32)
        diff = scale[:, None] * level + minimum[:, None] - x
        return ordered_sum(w * (np.abs(diff) if use_mad else diff * diff))

    iscale = np.float32(nmax) / (top - low)
    scale = np.float32(1) / iscale
    codes = encode(iscale, low)
    best = error(scale, codes, low)
    for step in range(nstep + 1 if nstep > 0 else 0):
        ratio = np.float32(rmin) + np.float32(rdelta) * np.float32(step) + np.float32(nmax)
        trial = encode(ratio / (top - low), low)
        level = trial.astype(np.float32)
        wl = w * level
        sum_l, sum_l2, sum_xl = ordered_sum(wl), ordered_sum(wl * level), ordered_sum(wl * x)
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale: Floats = np.divide(sum_w * sum_xl - sum_x * sum_l, det)
        new_low: Floats = np.divide(sum_l2 * sum_x - sum_l * sum_xl, det)
        above = new_low > 0
        new_scale = np.where(above, sum_xl / sum_l2, new_scale)
        new_low = np.where(above, np.float32(0), new_low)
        new_error = error(new_scale, trial, new_low)
        better = (det > 0) & (new_error < best)
        codes = np.where(better[:, None], trial, codes)
        best = np.where(better, new_error, best)
        scale = np.where(better, new_scale, scale)
        low = np.where(better, new_low, low)
    scale = np.where(flat, np.float32(0), scale)
    return scale, np.where(flat, flat_low, low), np.where(flat[:, None], 0, codes)


def halves(values: Floats) -> NDArray[np.uint8]:
    """Float16 bytes (little-endian, ties to even) of each value: shape (n,) gives (n, 2)."""
    with np.errstate(over="ignore"):
        packed = values.astype("<f2")
    return packed[:, None].view(np.uint8)


def from_halves(blocks: NDArray[np.uint8], offset: int) -> Floats:
    """The float16 at byte ``offset`` of each block, as float32 of shape (n, 1)."""
    pair: NDArray[Any] = np.ascontiguousarray(blocks[:, offset : offset + 2])
    return pair.view("<f2").astype(np.float32)
