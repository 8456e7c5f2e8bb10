"""The same codes under another grid's scales and zero points, bit for bit in the decoded weights.

A symmetric grid's zero point is half the range; another format says it as a whole number of each
group, or as the value of code 0. Groups may become smaller, with a scale repeated, where the other
format has not the size. Whatever the other grid does not hold exactly is not converted at all.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Floats
from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import GridCodes, IntegerGrid

Grid = IntegerGrid | FloatGrid
Zeros = NDArray[Any] | None

_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_EXACT_BITS = 16
"""Mantissas up to which a code's product with a scale, of 8 bits more, is a float32."""


class UnfitError(Exception):
    """Why a grid does not hold scales or zero points, as the end of a sentence."""


def convert_ranges(
    scales: Floats, zeros: Zeros, source: Grid, target: Grid, columns: int
) -> tuple[Floats, Zeros]:
    """Scales and zeros for the same codes of ``columns`` in ``target``.

    `UnfitError` where there are none. Both come with a row for each row of the matrix, as
    `GridCodes` has them but for strategy "tensor", whose scale is repeated.
    """
    count = target.groups(columns)
    times, rest = divmod(count, scales.shape[1])
    if rest or not times:
        raise UnfitError(f"its groups are smaller than those of {target.label}")
    if times > 1:
        scales = np.repeat(scales, times, axis=1)[:, :count]
        zeros = None if zeros is None else np.repeat(zeros, times, axis=1)[:, :count]
    if not np.isfinite(scales).all():
        raise UnfitError("a scale is no finite number")
    if isinstance(target, FloatGrid) or isinstance(source, FloatGrid):
        _hold_float_scales(scales, source, target)
        return scales, None
    _hold(scales, target.scale_dtype, "scale")
    found = _convert_zeros(scales, zeros, source, target)
    _check_sums(scales, zeros, found, source, target)
    return scales, found


def regrid(coded: GridCodes, source: Grid, target: Grid, whole: float | None = None) -> GridCodes:
    """The codes of ``source`` with the scales and zeros of ``target``.

    `UnfitError` where it has not them. ``whole`` is the scale of the whole matrix where the target
    has one.
    """
    bound = target if whole is None or isinstance(target, IntegerGrid) else target.with_whole(whole)
    scales, zeros = convert_ranges(coded.scales, coded.zeros, source, bound, coded.codes.shape[1])
    if target.strategy == "tensor":
        scales = scales[:1]
        zeros = None if zeros is None else zeros[:1]
    return GridCodes(coded.codes, scales, zeros, whole, coded.order)


def is_same_grid(source: Grid, target: Grid, columns: int) -> bool:
    """Whether codes of ``source`` are on the grid of ``target`` but for scales and zero points."""
    if (source.bits, source.groups(columns)) != (target.bits, target.groups(columns)):
        return False
    if isinstance(source, FloatGrid) or isinstance(target, FloatGrid):
        return (
            isinstance(source, FloatGrid)
            and isinstance(target, FloatGrid)
            and (source.kind, source.scales) == (target.kind, target.scales)
            and (source.strategy == "block") == (target.strategy == "block")
        )
    return source.ordered == target.ordered and (source.zero != "edge" or target.zero == "edge")


def holds_all(source: Grid, target: Grid) -> bool:
    """Whether ``target`` holds whatever scales and zero points ``source`` has."""
    if isinstance(source, IntegerGrid) and isinstance(target, IntegerGrid):
        zeros = (source.zero, target.zero)
        certain = zeros in (("middle", "middle"), ("middle", "integer"), ("edge", "edge"))
        return source.scale_dtype == target.scale_dtype and certain
    if isinstance(source, FloatGrid) and isinstance(target, FloatGrid):
        if source.scales == target.scales == "float":
            return source.scale_dtype == target.scale_dtype
        return source.scales == target.scales == "E8M0"
    return False


def as_read(scales: Floats, grid: FloatGrid) -> Floats:
    """What a reader makes of ``scales`` once ``grid`` has stored them."""
    if grid.scales == "float":
        with np.errstate(over="ignore"):
            return np.asarray(scales.astype(_DTYPES[grid.scale_dtype]), np.float32)
    kind = ml_dtypes.float8_e4m3fn if grid.scales == "E4M3" else ml_dtypes.float8_e8m0fnu
    found = grid.scale_codes(scales).view(kind).astype(np.float32)
    whole = np.float32(grid.whole or 1.0) if grid.scales == "E4M3" else np.float32(1)
    return np.asarray(found / whole, np.float32)


def _hold_float_scales(scales: Floats, source: Grid, target: Grid) -> None:
    if not isinstance(target, FloatGrid) or not isinstance(source, FloatGrid):
        raise UnfitError(f"integers are no small floats as {target.label} has")
    found = as_read(scales, target)
    apart = np.abs(found - scales)
    # A scale of the whole matrix that a file multiplies with is its divisor's rounded reciprocal.
    slack = np.float32(2.0**-22) if source.scales == target.scales == "E4M3" else np.float32(0)
    bad = apart > slack * np.abs(scales)
    if bad.any():
        raise UnfitError(f"{target.label} does not hold the scale {scales[bad][0]:.9g}")


def _hold(values: Floats, dtype: str, what: str) -> None:
    with np.errstate(over="ignore"):
        again = values.astype(_DTYPES[dtype]).astype(np.float32)
    if not np.array_equal(again, values):
        raise UnfitError(f"{dtype} does not hold the {what} {values[again != values][0]:.9g}")


def _convert_zeros(scales: Floats, zeros: Zeros, source: IntegerGrid, target: IntegerGrid) -> Zeros:
    middle = source.middle
    if target.zero == "edge":
        if source.zero == "edge":
            edges = zeros
        else:
            steps = np.float64(middle) if zeros is None else zeros.astype(np.float64)
            wide = -steps * scales.astype(np.float64)
            edges = wide.astype(np.float32)
            if not np.array_equal(edges.astype(np.float64), wide):
                raise UnfitError("float32 does not hold a scale times its zero point")
        _hold(np.asarray(edges, np.float32), target.scale_dtype, "value of code 0")
        return edges
    whole = _whole_zeros(scales, zeros, source)
    if target.zero == "middle":
        if whole is not None and (whole != middle).any():
            raise UnfitError(f"a zero point is {int(whole[whole != middle][0])}, not {middle}")
        return None
    if whole is None:
        return np.full(scales.shape, middle, np.int32)
    least, most = target.lowest_zero, target.top + target.lowest_zero
    outside = (whole < least) | (whole > most)
    if outside.any():
        raise UnfitError(
            f"a zero point is {int(whole[outside][0])}, and it holds {least} to {most}"
        )
    return whole


def _whole_zeros(scales: Floats, zeros: Zeros, source: IntegerGrid) -> NDArray[np.int32] | None:
    """Zero points as whole numbers; None where all are half the range."""
    if source.zero != "edge" or zeros is None:
        return None if zeros is None else zeros.astype(np.int32)
    wide = scales.astype(np.float64)
    with np.errstate(all="ignore"):
        steps = np.where(wide == 0, source.middle, np.rint(-zeros / wide))
    steps = np.clip(np.nan_to_num(steps), -(2**20), 2**20)
    bad = -steps * wide != zeros
    if bad.any():
        raise UnfitError(f"the value of code 0, {zeros[bad][0]:.9g}, is no whole number of scales")
    return np.asarray(steps, np.int32)


def _check_sums(
    scales: Floats, zeros: Zeros, found: Zeros, source: IntegerGrid, target: IntegerGrid
) -> None:
    """`UnfitError` where scale * code + edge is rounded otherwise than scale * (code - zero)."""
    if (source.zero == "edge") == (target.zero == "edge"):
        return
    bits = np.asarray(scales, np.float32).view(np.uint32)
    long = (bits & np.uint32((1 << (24 - _EXACT_BITS)) - 1)) != 0
    if not long.any():
        return
    edges = np.asarray(zeros if source.zero == "edge" else found, np.float32)[long]
    other = found if source.zero == "edge" else zeros
    steps = np.float32(source.middle) if other is None else other[long].astype(np.float32)
    for code in range(source.top + 1):
        apart = np.float32(code) * scales[long] + edges
        if not np.array_equal(apart, (np.float32(code) - steps) * scales[long]):
            raise UnfitError(
                "float32 rounds scale * code + offset otherwise than scale * (code - zero)"
            )
