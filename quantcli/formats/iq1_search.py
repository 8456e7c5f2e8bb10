"""What IQ1_S and IQ1_M share: the best split of a block's weights in three, and its grid points.

A level is worth -1, 0 or 1, plus a shift of an eighth up or down. The weights are sorted, and of
all ways to cut them in three, with either shift, the one with the largest
``(sum w x q)^2 / sum w q^2`` is taken, from running sums. A group of eight that is then no point of
the grid is moved to the nearest of that code's neighbours, and the scale is fitted once more.

Equal weights keep their order. The reference sorts with ``qsort``, which promises nothing about
them, but glibc's is a merge sort, which keeps the order too; elsewhere the reference's own bytes
may be others.

Where distances overflow float32, ggml reads beyond its arrays or aborts; here the scale becomes
NaN, which is refused later.

Source: quantize_row_iq1_s_impl, quantize_row_iq1_m_impl and iq1_find_best_neighbour2 in
ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Floats
from quantcli.formats.codebook import Mask, place_groups
from quantcli.formats.grids import Grid, Indices
from quantcli.formats.search import ordered_sum

GROUP = 8
SHIFT = np.float32(0.125)
_UP, _DOWN = 1 + SHIFT, 1 - SHIFT

Sums = tuple[Floats, Floats]
Shifts = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Blocks cut in three; axis 0 is blocks."""

    found: Mask
    scale: Floats
    levels: NDArray[np.uint8]
    """0, 1 or 2, shape (n, weights)."""
    shift: Shifts
    """Which of the candidates' shifts, a number below ``shifts``."""


class _Best:
    """The best candidate so far of each block."""

    def __init__(self, scale: Floats) -> None:
        self.scale = scale
        self.score = np.full(len(scale), -np.finfo(np.float32).max, np.float32)
        self.low, self.middle, self.shift = (np.full(len(scale), -1) for _ in range(3))

    def offer(self, sums: Sums, low: int, middle: int, shift: int) -> None:
        sum_qx, sum_q2 = sums
        better = (sum_q2 > 0) & (sum_qx * sum_qx > self.score * sum_q2)
        scale = sum_qx / sum_q2
        self.scale = np.where(better, scale, self.scale)
        self.score = np.where(better, scale * sum_qx, self.score)
        self.low = np.where(better, low, self.low)
        self.middle = np.where(better, middle, self.middle)
        self.shift = np.where(better, shift, self.shift)


def split_blocks(x: Floats, w: Floats, *, halves: bool) -> Split:
    """The best cut of blocks ``x`` with weights ``w``, both of shape (n, weights).

    Shift 0 is up and 1 down; with ``halves`` each half of a block has one, the first's counting
    two.
    """
    order = np.argsort(x, axis=1, kind="stable")
    best = _Best(np.abs(x).max(axis=1))
    with np.errstate(all="ignore"):
        cut = _cut_halves if halves else _cut_whole
        cut(np.take_along_axis(x, order, 1), np.take_along_axis(w, order, 1), order, best)
    place = np.arange(x.shape[1])
    sorted_levels = (place >= best.low[:, None]).astype(np.uint8) + (place >= best.middle[:, None])
    levels = np.empty_like(sorted_levels)
    np.put_along_axis(levels, order, sorted_levels, 1)
    turned = best.scale < 0
    levels = np.where(turned[:, None], 2 - levels, levels).astype(np.uint8)
    shift = np.where(turned, (3 if halves else 1) - best.shift, best.shift)
    return Split(best.low >= 0, np.abs(best.scale), levels, shift)


def _running(values: Floats) -> Floats:
    start: Floats = np.zeros((len(values), 1), np.float32)
    return np.add.accumulate(np.concatenate([start, values], axis=1), axis=1, dtype=np.float32)


def _cut_whole(x: Floats, w: Floats, order: Indices, best: _Best) -> None:
    n = x.shape[1]
    sum_x, sum_w = _running(w * x).T, _running(w).T
    shifts = ((-_DOWN, SHIFT, _UP), (-_UP, -SHIFT, _DOWN))

    def parts(running: Floats, low: int, middle: int) -> Floats:
        below, above = running[middle] - running[low], running[n] - running[middle]
        return np.stack([running[low], below, above])

    for low in range(n + 1):
        for middle in range(low, n + 1):
            of_x, of_w = parts(sum_x, low, middle), parts(sum_w, low, middle)
            for shift, q in enumerate(shifts):
                qx = of_x[0] * q[0] + of_x[1] * q[1] + of_x[2] * q[2]
                q2 = of_w[0] * q[0] * q[0] + of_w[1] * q[1] * q[1] + of_w[2] * q[2] * q[2]
                best.offer((qx, q2), low, middle, shift)


def _cut_halves(x: Floats, w: Floats, order: Indices, best: _Best) -> None:
    """Levels are one apart, so a sum over three parts is the whole at the top less two sums."""
    n = x.shape[1]
    square = SHIFT * SHIFT
    tops = ((_UP, _DOWN * _DOWN - square, square - _UP * _UP),
            (_DOWN, _UP * _UP - square, square - _DOWN * _DOWN))  # fmt: skip
    mine = [order < n // 2, order >= n // 2]
    sum_x = [_running(np.where(half, w * x, np.float32(0))).T for half in mine]
    sum_w = [_running(np.where(half, w, np.float32(0))).T for half in mine]

    def sums(half: int, down: int, low: int, middle: int) -> Sums:
        top, first, second = tops[down]
        less = sum_x[half][low] + sum_x[half][middle]
        whole = sum_w[half][n] * top * top
        sum_q2 = whole + sum_w[half][low] * first + sum_w[half][middle] * second
        return sum_x[half][n] * top - less, sum_q2

    for low in range(n + 1):
        for middle in range(low, n + 1):
            found = [[sums(half, down, low, middle) for down in (0, 1)] for half in (0, 1)]
            for shift in range(4):
                (qx0, q20), (qx1, q21) = found[0][shift >> 1], found[1][shift & 1]
                best.offer((qx0 + qx1, q20 + q21), low, middle, shift)


def worth(levels: NDArray[np.uint8], down: Mask | bool) -> Floats:
    """What levels are worth; ``down``, of a shape that broadcasts, says which are shifted down."""
    return (levels.astype(np.float32) - 1) + np.where(down, -SHIFT, SHIFT)


def place(x: Floats, w: Floats, split: Split, down: Mask, grid: Grid) -> tuple[Floats, Indices]:
    """Scale, shape (n,), and points, shape (n, groups), of split blocks.

    ``down``, shape (n, groups), says which groups are shifted down. Blocks that no split was found
    for get scale 0 and point 0.
    """
    groups = x.shape[1] // GROUP
    flat_down = down.reshape(-1)
    codes = grid.codes(split.levels.reshape(-1, GROUP))
    codes = np.where(split.found.repeat(groups), codes, grid.codes(grid.levels[:1])[0])
    off = grid.index[codes] < 0
    points, nowhere = grid.index[codes], np.zeros_like(off)
    with np.errstate(all="ignore"):
        for side in (False, True):
            chosen = np.flatnonzero(off & (flat_down == side))

            def side_worth(levels: NDArray[np.uint8], side: bool = side) -> Floats:
                return worth(levels, side)

            points[chosen], _, nowhere[chosen] = place_groups(
                x.reshape(-1, GROUP)[chosen],
                w.reshape(-1, GROUP)[chosen],
                codes[chosen],
                split.scale.repeat(groups)[chosen],
                grid,
                side_worth,
            )
        points = points.reshape(-1, groups)
        q = worth(grid.levels[points], down[:, :, None]).reshape(x.shape)
        sum_qx, sum_q2 = ordered_sum(w * q * x), ordered_sum(w * q * q)
        fits = off.reshape(-1, groups).any(axis=1) & (sum_qx > 0) & (sum_q2 > 0)
        scale = np.where(fits, sum_qx / sum_q2, split.scale)
    scale = np.where(nowhere.reshape(-1, groups).any(axis=1), np.float32(np.nan), scale)
    return np.where(split.found, scale, np.float32(0)), points
