"""What IQ3_XXS and IQ3_S share: the search for a sub-block's scale and grid points.

A sub-block of 32 weights tries scales ``max / (15 + 0.2 k)``. Under each, every weight is rounded
to a level ``l`` (worth ``2l + 1``), and a group of four that is then no point of the grid is moved
to the nearest of that code's neighbours. The trial with the largest ``(sum w x q)^2 / sum w q^2``
wins; its groups are looked up once more under the scale that fits them best.

Where distances overflow float32, ggml aborts; here the scale becomes NaN, which is refused later.

Source: quantize_row_iq3_xxs_impl, quantize_row_iq3_s_impl and iq3_find_best_neighbour in
ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Bytes, Floats
from quantcli.formats.grids import Grid, Indices
from quantcli.formats.search import Codes, importance_weights, nearest, ordered_sum

SUPER, BLOCK, GROUP = 256, 32, 4
PARTS = SUPER // BLOCK
GROUPS = BLOCK // GROUP

_FARTHEST = np.finfo(np.float32).max

Mask = NDArray[np.bool_]


def search_weights(rows: Floats, importance: Floats | None) -> Floats:
    """Weights of the search, shape (sub-blocks, 32): ``importance * sqrt(sigma2 + x^2)`` or x².

    ``sigma2`` is twice the mean square of the super-block.
    """
    x = rows.reshape(-1, SUPER)
    with np.errstate(all="ignore"):
        squares = x * x
        if importance is None:
            return squares.reshape(-1, BLOCK)
        sigma2 = np.float32(2) * ordered_sum(squares)[:, None] / np.float32(SUPER)
    spread = np.broadcast_to(importance, rows.shape).reshape(-1, SUPER)
    return importance_weights(x, spread, sigma2).reshape(-1, BLOCK)


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
        q = _worth(grid.levels[points]).reshape(x.shape)
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


def _worth(levels: NDArray[np.uint8]) -> Floats:
    worth: Floats = levels.astype(np.float32) * np.float32(2) + np.float32(1)
    return worth


def _place(
    x: Floats, root: Floats, inverse: Floats, scale: Floats, grid: Grid
) -> tuple[Indices, Mask, Mask]:
    """Points of all groups, shape (n, 8); which were off the grid, and which had none near."""
    rounded = nearest(np.float32(0.5) * (inverse[:, None] * x - np.float32(1)))
    codes = grid.codes(np.clip(rounded, 0, len(grid.values) - 1).reshape(-1, GROUP))
    points = grid.index[codes]
    off = points < 0
    groups = np.flatnonzero(off)
    near = grid.near[codes[groups]]
    distance: Floats = np.zeros(near.shape, np.float32)
    for i in range(GROUP):
        q = _worth(grid.levels[near, i])
        apart = scale[groups // GROUPS, None] * q - x.reshape(-1, GROUP)[groups, i, None]
        distance += root.reshape(-1, GROUP)[groups, i, None] * apart * apart
    distance = np.where(distance < _FARTHEST, distance, _FARTHEST)
    closest = distance.argmin(axis=1)[:, None]
    nowhere = np.zeros_like(off)
    if len(groups):
        points[groups] = np.take_along_axis(near, closest, axis=1)[:, 0]
        nowhere[groups] = np.take_along_axis(distance, closest, axis=1)[:, 0] == _FARTHEST
    shape = (len(x), GROUPS)
    return points.reshape(shape), off.reshape(shape), nowhere.reshape(shape)


def largest(scales: Floats) -> Floats:
    """The largest of each row of scales, at least 0; NaN where there is one."""
    top: Floats = np.maximum(scales.max(axis=1), np.float32(0))
    return top


def round_scales(scales: Floats, d: Floats) -> Codes:
    """The four bits ``l`` of each sub-block's scale ``(2l + 1) d``; shapes (n, 8) and (n,)."""
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / d
        steps = nearest(np.float32(0.5) * (inverse[:, None] * scales - np.float32(1)))
    return np.clip(steps, 0, 15)


def sign_bytes(negative: Mask) -> Bytes:
    """Masks of shape (n, 32) as four bytes, the first weight in the lowest bit."""
    return np.packbits(negative, axis=1, bitorder="little")


def apply_signs(values: Floats, signs: Bytes) -> Floats:
    """``values`` of shape (n, 32), negated where ``signs``, shape (n, 4), have a bit set."""
    negative = np.unpackbits(np.ascontiguousarray(signs), axis=1, bitorder="little")
    return values * np.where(negative, np.float32(-1), np.float32(1))
