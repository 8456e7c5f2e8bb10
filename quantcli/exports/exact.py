"""Weights that lie on an integer grid, as blocks of 32 that decode to the very same weights.

A group's weights are whole multiples of its scale (above an offset, where the grid is affine), so
its largest magnitude, or its range, is one of a few multiples: each is tried until the float16
scale that it gives makes every weight again, bit for bit. All 32-blocks of a group get its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantcli.exports.blocks import GRIDS, GROUP
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.legacy import join_fifth_bits, join_nibbles
from quantcli.formats.search import halves

Codes = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Packed rows, uint8 (rows, row bytes), and which rows and groups are not exact."""

    packed: Bytes
    missed: NDArray[np.bool_]


def fit_rows(kind: str, rows: Floats, group: int) -> Fitted:
    """``rows`` (n, columns) in the block format ``kind``; ``group`` columns share a scale.

    ``missed`` is (n, groups): where the grid of the block format does not hold the weights.
    """
    grid = GRIDS[kind]
    values = rows.reshape(-1, group)
    fit = _fit_affine if grid.affine else _fit_symmetric
    scales, edges, codes, good = fit(values, grid.bits)
    parts = [_spread(scales, group)]
    if edges is not None:
        parts.append(_spread(edges, group))
    blocks = codes.reshape(-1, GROUP)
    if grid.bits == 8:
        parts.append((blocks - 128).astype(np.int8).view(np.uint8))
    else:
        parts += [join_fifth_bits(blocks)] if grid.bits == 5 else []
        parts.append(join_nibbles(blocks))
    packed = np.concatenate(parts, axis=1).reshape(len(rows), -1)
    return Fitted(packed, ~good.reshape(len(rows), -1))


def _spread(values: Floats, group: int) -> Bytes:
    """One float16 for each block of a group, as bytes."""
    return halves(np.repeat(values, group // GROUP))


def _fit_symmetric(values: Floats, bits: int) -> tuple[Floats, None, Codes, NDArray[np.bool_]]:
    """Scales, codes from 0 on and success, of groups whose weights are scale * (code - half)."""
    half = 1 << (bits - 1)
    top = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)[:, 0]
    scales = np.zeros(len(values), np.float32)
    codes = np.full(values.shape, half, np.int32)
    good = top == 0
    for multiple in range(half, 0, -1):
        rest = np.flatnonzero(~good)
        if not len(rest):
            break
        # Only the lowest code reaches half the range.
        step = _half_precision(top[rest] / np.float32(-half if multiple == half else multiple))
        steps, right = _steps(values[rest], step, np.zeros(len(rest), np.float32))
        right &= (steps >= -half).all(axis=1) & (steps < half).all(axis=1)
        found = rest[right]
        scales[found], codes[found], good[found] = step[right], steps[right] + half, True
    return scales, None, codes, good


def _fit_affine(values: Floats, bits: int) -> tuple[Floats, Floats, Codes, NDArray[np.bool_]]:
    """Scales, values of code 0, codes and success, of groups that are scale * code + edge."""
    highest = (1 << bits) - 1
    low, high = values.min(axis=1), values.max(axis=1)
    scales = np.zeros(len(values), np.float32)
    edges = _half_precision(low)
    codes = np.zeros(values.shape, np.int32)
    good = (low == high) & (edges == low)
    for multiple in range(highest, 0, -1):
        for below in range(highest - multiple + 1):
            rest = np.flatnonzero(~good)
            if not len(rest):
                return scales, edges, codes, good
            size = _half_precision((high[rest] - low[rest]) / np.float32(multiple))
            # Codes may count up from the low end or, with a negative scale, down from the high.
            for step, edge in (
                (size, low[rest] - np.float32(below) * size),
                (-size, high[rest] + np.float32(below) * size),
            ):
                edge = _half_precision(edge)
                steps, right = _steps(values[rest], step, edge)
                right &= (steps >= 0).all(axis=1) & (steps <= highest).all(axis=1)
                found = rest[right]
                scales[found], edges[found] = step[right], edge[right]
                codes[found], good[found] = steps[right], True
    return scales, edges, codes, good


def _steps(values: Floats, step: Floats, edge: Floats) -> tuple[Codes, NDArray[np.bool_]]:
    """The nearest whole steps from the edge, and for which groups they give the values again."""
    with np.errstate(all="ignore"):
        steps = np.rint((values - edge[:, None]) / step[:, None])
        again = steps.astype(np.float32) * step[:, None] + edge[:, None]
        held = np.isfinite(steps).all(axis=1) & (np.abs(steps) < 1 << 12).all(axis=1)
        right = (again == values).all(axis=1) & held
    return np.where(held[:, None], steps, 0).astype(np.int32), right


def _half_precision(values: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
