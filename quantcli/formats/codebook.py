"""What the formats with codebook grids share: signs, grid points, scales of blocks.

A group of four or eight weights is rounded to levels. Where these are no point of the grid, the
group takes the nearest of that code's neighbours, the first of equals. Where every distance
overflows float32, ggml aborts; here it is told which groups found no point, and the searches then
make the scale NaN, which is refused later.

Source: iq2_find_best_neighbour, iq3_find_best_neighbour and iq1_find_best_neighbour2 in
ggml-quants.c, and what the encoders of these types repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Bytes, Floats
from quantcli.formats.grids import Grid, Indices
from quantcli.formats.search import Codes, importance_weights, nearest, ordered_sum

SUPER = 256
"""Weights in a super-block."""

_FARTHEST = np.finfo(np.float32).max

Mask = NDArray[np.bool_]
Worth = Callable[[NDArray[np.uint8]], Floats]


def search_weights(
    rows: Floats, importance: Floats | None, spread: int, floor: float = 0.0
) -> Floats:
    """Weights of the search, shape (super-blocks, 256): ``importance * sqrt(sigma2 + x^2)``.

    ``sigma2`` is ``spread`` times the mean square of the super-block. Without importance they are
    ``x^2``, to which ``floor`` times ``sigma2`` is added.
    """
    x = rows.reshape(-1, SUPER)
    with np.errstate(all="ignore"):
        squares = x * x
        sigma2 = np.float32(spread) * ordered_sum(squares)[:, None] / np.float32(SUPER)
        if importance is None:
            return np.float32(floor) * sigma2 + squares if floor else squares
    each = np.broadcast_to(importance, rows.shape).reshape(-1, SUPER)
    return importance_weights(x, each, sigma2)


def odd_worth(levels: NDArray[np.uint8]) -> Floats:
    """What levels 0, 1, 2 ... are worth where signs are apart: 1, 3, 5 ..."""
    worth: Floats = levels.astype(np.float32) * np.float32(2) + np.float32(1)
    return worth


def even_signs(blocks: Floats, weights: Floats) -> tuple[Floats, Mask]:
    """Magnitudes and signs; one of each eight weights is turned round if its minuses are odd."""
    x = blocks.reshape(-1, 8)
    negative = ~(x >= 0)
    magnitude = np.where(negative, -x, x)
    with np.errstate(all="ignore"):
        matters = weights.reshape(-1, 8) * x * x
    least = np.arange(8) == _first_smallest(matters)[:, None]
    turned = least & (negative.sum(axis=1) % 2 == 1)[:, None]
    magnitude = np.where(turned, -magnitude, magnitude)
    return magnitude.reshape(blocks.shape), (negative ^ turned).reshape(blocks.shape)


def _first_smallest(values: Floats) -> Indices:
    """As a loop with ``<`` finds it: a NaN is never smaller, and nothing is smaller than one."""
    filled = np.where(np.isnan(values), np.float32(np.inf), values)
    return np.where(np.isnan(values[:, 0]), 0, filled.argmin(axis=1))


def place_groups(
    x: Floats, w: Floats, codes: Indices, scale: Floats, grid: Grid, worth: Worth
) -> tuple[Indices, Mask, Mask]:
    """Points of groups ``x``, shape (n, 4) or (n, 8): their codes' own, or the nearest neighbours.

    ``worth`` gives what levels are worth, to be multiplied by ``scale``. Returned too: which codes
    are no points of the grid, and of these, which have no neighbour at a finite distance.
    """
    points = grid.index[codes]
    off = points < 0
    nowhere = np.zeros_like(off)
    # A few at a time: lists of neighbours are long.
    for groups in np.array_split(np.flatnonzero(off), 1 + int(off.sum()) // 4096):
        if not len(groups):
            continue
        near = grid.near[codes[groups]]
        distance: Floats = np.zeros(near.shape, np.float32)
        for i in range(x.shape[1]):
            q = worth(grid.levels[near, i])
            apart = scale[groups, None] * q - x[groups, i, None]
            distance += w[groups, i, None] * apart * apart
        distance = np.where(distance < _FARTHEST, distance, _FARTHEST)
        closest = distance.argmin(axis=1)[:, None]
        points[groups] = np.take_along_axis(near, closest, axis=1)[:, 0]
        nowhere[groups] = np.take_along_axis(distance, closest, axis=1)[:, 0] == _FARTHEST
    return points, off, nowhere


def largest(scales: Floats) -> Floats:
    """The largest of each row of scales, at least 0; NaN where there is one."""
    top: Floats = np.maximum(scales.max(axis=1), np.float32(0))
    return top


def round_scales(scales: Floats, d: Floats, most: int = 15) -> Codes:
    """The steps ``l``, up to ``most``, of blocks' scales ``(2l + 1) d``; shapes (n, k) and (n,)."""
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / d
        steps = nearest(np.float32(0.5) * (inverse[:, None] * scales - np.float32(1)))
    return np.clip(steps, 0, most)


def sign_bytes(negative: Mask) -> Bytes:
    """Masks of shape (n, 8k) as k bytes, the first weight in the lowest bit."""
    return np.packbits(negative, axis=1, bitorder="little")


def all_signs(seven: NDArray[np.integer[Any]]) -> Bytes:
    """Seven signs, and their parity as the eighth."""
    signs = (seven & 127).astype(np.uint8)
    return signs | (np.bitwise_count(signs) & np.uint8(1)) << np.uint8(7)


def apply_signs(values: Floats, signs: Bytes) -> Floats:
    """``values`` of shape (n, 8k), negated where ``signs``, shape (n, k), have a bit set."""
    negative = np.unpackbits(np.ascontiguousarray(signs), axis=1, bitorder="little")
    return values * np.where(negative, np.float32(-1), np.float32(1))
