"""What IQ2_XXS, IQ2_XS and IQ2_S share: the search for a block's scale and grid points.

A block of 16 or 32 weights tries scales ``max / (5 + 0.1 k)``. Under each, every weight is rounded
to a level ``l`` (worth ``2l + 1``), and a group of eight that is then no point of the grid is moved
to the nearest of that code's neighbours. The trial with the largest ``(sum w x q)^2 / sum w q^2``
wins; its groups are looked up once more under the scale that fits them best.

Where distances overflow float32, ggml aborts; here the scale becomes NaN, which is refused later.

Source: quantize_row_iq2_xxs_impl, quantize_row_iq2_xs_impl and quantize_row_iq2_s_impl in
ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import Floats
from quantcli.formats.codebook import Mask, odd_worth, place_groups
from quantcli.formats.grids import Grid, Indices
from quantcli.formats.search import nearest, ordered_sum

GROUP = 8


def search(
    x: Floats, weights: Floats, grid: Grid, trials: range, *, fitted: Floats | None = None
) -> tuple[Floats, Indices]:
    """Scale, shape (n,), and points, shape (n, groups), of blocks ``x`` of shape (n, weights).

    ``x`` holds magnitudes, or the negative of one that gets the wrong sign. The scale is negative
    where all signs had better be turned round. ``fitted``: scales of shape (n,), three of which
    replace the maximum; then the last pass takes every group, not only those off the grid.
    """
    with np.errstate(all="ignore"):
        return _search(x, weights, grid, trials, fitted)


def _search(
    x: Floats, w: Floats, grid: Grid, trials: range, fitted: Floats | None
) -> tuple[Floats, Indices]:
    root = np.sqrt(w)
    groups = x.shape[1] // GROUP
    lost = np.zeros(len(x), np.bool_)

    def sums(points: Indices) -> tuple[Floats, Floats]:
        q = odd_worth(grid.levels[points]).reshape(x.shape)
        return ordered_sum(w * x * q), ordered_sum(w * q * q)

    best: Floats = np.zeros(len(x), np.float32)
    top = x.max(axis=1) if fitted is None else np.float32(3) * fitted
    scale = top / np.float32(5) if fitted is None else fitted
    points = np.zeros((len(x), groups), np.int64)
    off = np.full((len(x), groups), fitted is not None)
    for step in trials:
        inverse = (np.float32(5) + np.float32(step) * np.float32(0.1)) / top
        trial, trial_off, nowhere = _place(x, root, inverse, np.float32(1) / inverse, grid)
        lost |= nowhere.any(axis=1)
        sum_lx, sum_l2 = sums(trial)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best = np.where(better, scale * sum_lx, best)
        points = np.where(better[:, None], trial, points)
        if fitted is None:
            off = np.where(better[:, None], trial_off, off)

    again = off & (scale > 0)[:, None]
    redone, _, nowhere = _place(x, root, np.float32(1) / scale, scale, grid)
    lost |= (nowhere & again).any(axis=1)
    points = np.where(again, redone, points)
    sum_lx, sum_l2 = sums(points)
    scale = np.where(again.any(axis=1) & (sum_l2 > 0), sum_lx / sum_l2, scale)
    return np.where(lost, np.float32(np.nan), scale), points


def _place(
    x: Floats, root: Floats, inverse: Floats, scale: Floats, grid: Grid
) -> tuple[Indices, Mask, Mask]:
    """Points of all groups, shape (n, groups); which were off the grid, and which had none near."""
    rounded = nearest(np.float32(0.5) * (inverse[:, None] * x - np.float32(1)))
    codes = grid.codes(np.clip(rounded, 0, 2).reshape(-1, GROUP))
    scales = scale.repeat(x.shape[1] // GROUP)
    placed = place_groups(
        x.reshape(-1, GROUP), root.reshape(-1, GROUP), codes, scales, grid, odd_worth
    )
    shape = (len(x), -1)
    return placed[0].reshape(shape), placed[1].reshape(shape), placed[2].reshape(shape)
