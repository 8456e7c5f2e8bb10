"""What IQ3_XXS and IQ3_S share: the search for a sub-block's scale and grid points.

A sub-block of 32 weights tries scales ``max / (15 + 0.2 k)``. Under each, every weight is rounded
to a level ``l`` (worth ``2l + 1``), and a group of four that is then no point of the grid is moved
to the nearest of that code's neighbours. The trial with the largest ``(sum w x q)^2 / sum w q^2``
wins; its groups are looked up once more under the scale that fits them best.

Where distances overflow float32, ggml aborts; here the scale becomes NaN, which is refused later.

Source: quantize_row_iq3_xxs_impl and quantize_row_iq3_s_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import Floats
from quantcli.formats.codebook import SUPER, Mask, odd_worth, place_groups
from quantcli.formats.grids import Grid, Indices
from quantcli.formats.search import nearest, ordered_sum

BLOCK, GROUP = 32, 4
PARTS = SUPER // BLOCK
GROUPS = BLOCK // GROUP


def search(
    x: Floats, weights: Floats, grid: Grid, trials: range, *, search_all: bool
) -> tuple[Floats, Indices]:
    """Scale, shape (n,), and points, shape (n, 8), of sub-blocks ``x`` of shape (n, 32).

    ``x`` holds magnitudes, or the negative of one that gets the wrong sign. The scale is negative
    where all signs had better be turned round. ``search_all``: the last pass takes every group of a
    sub-block that has one off the grid, not only that one.
    """
    with np.errstate(all="ignore"):
        return _search(x, weights, grid, trials, search_all)


def _search(
    x: Floats, w: Floats, grid: Grid, trials: range, search_all: bool
) -> tuple[Floats, Indices]:
    root = np.sqrt(w)
    top = x.max(axis=1)
    lost = np.zeros(len(x), np.bool_)

    def sums(points: Indices) -> tuple[Floats, Floats]:
        q = odd_worth(grid.levels[points]).reshape(x.shape)
        return ordered_sum(w * x * q), ordered_sum(w * q * q)

    best: Floats = np.zeros(len(x), np.float32)
    scale = top / np.float32(15)
    points = np.zeros((len(x), GROUPS), np.int64)
    off = np.full((len(x), GROUPS), search_all)
    for step in trials:
        inverse = (np.float32(15) + np.float32(step) * np.float32(0.2)) / top
        trial, trial_off, nowhere = _place(x, root, inverse, np.float32(1) / inverse, grid)
        lost |= nowhere.any(axis=1)
        sum_lx, sum_l2 = sums(trial)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best = np.where(better, scale * sum_lx, best)
        points = np.where(better[:, None], trial, points)
        off = np.where(better[:, None], trial_off, off)

    again = off.any(axis=1) & (scale > 0)
    redone, _, nowhere = _place(x, root, np.float32(1) / scale, scale, grid)
    taken = again[:, None] & (off | search_all)
    lost |= (nowhere & taken).any(axis=1)
    points = np.where(taken, redone, points)
    sum_lx, sum_l2 = sums(points)
    scale = np.where(again & (sum_l2 > 0), sum_lx / sum_l2, scale)
    return np.where(lost, np.float32(np.nan), scale), points


def _place(
    x: Floats, root: Floats, inverse: Floats, scale: Floats, grid: Grid
) -> tuple[Indices, Mask, Mask]:
    """Points of all groups, shape (n, 8); which were off the grid, and which had none near."""
    rounded = nearest(np.float32(0.5) * (inverse[:, None] * x - np.float32(1)))
    codes = grid.codes(np.clip(rounded, 0, len(grid.values) - 1).reshape(-1, GROUP))
    scales = scale.repeat(GROUPS)
    placed = place_groups(
        x.reshape(-1, GROUP), root.reshape(-1, GROUP), codes, scales, grid, odd_worth
    )
    shape = (len(x), GROUPS)
    return placed[0].reshape(shape), placed[1].reshape(shape), placed[2].reshape(shape)
