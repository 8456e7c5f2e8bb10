"""The integer grid: codes of 2 to 8 bits with a scale, and a zero point, for each group of a row.

A weight is ``scale * (code - zero)``, codes counting from 0 to 2^bits - 1. The zero point is half
the range for every group ("middle": a symmetric grid), a whole number of the group's own
("integer"), or there is in its place the value of code 0 as a float ("edge", which is MLX's way:
``scale * code + edge``). Scales, and edges, are rounded to the dtype that the target stores
before codes are chosen, so that each code is the nearest for the scale that a runtime sees.

Ranges are the smallest and the largest weight ("minmax"; of a symmetric grid the largest magnitude
both ways, as compressed-tensors and GPTQ have it), or the range that gives the smallest
squared error among shrunken ones, followed by least squares on the codes ("mse"); importance
weights the columns' errors. Everything is computed in float32, row by row, so that the codes do
not depend on how many rows are given at once.

Sources: the layouts in `quantcli.layouts`; the rule of ``mlx.core.quantize`` for edges,
which lets one code be exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Floats
from quantcli.formats.native import UnencodableError

Codes = NDArray[np.uint8]
Zero = Literal["middle", "integer", "edge"]
Strategy = Literal["group", "channel", "tensor"]
Search = Literal["minmax", "mse"]

_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SMALLEST = {"F32": np.float32(2**-149), "F16": np.float32(2**-24), "BF16": np.float32(2**-133)}

_SHRINK_TO = {2: 0.4, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.88, 7: 0.94, 8: 0.97}
"""The narrowest range that is tried, as a part of the full one; wider grids clip less."""
_SHRINK_STEPS = 15
_REFITS = 2
_CHUNK = 1 << 17
"""Weights that are worked on at once: what a processor's own cache holds."""


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """How a matrix's weights become codes.

    ``group_size`` weights of a row share a scale ("group"), all of a row ("channel") or all of the
    matrix ("tensor"). ``scale_dtype`` is "F32", "F16" or "BF16". ``lowest_zero`` is the least
    zero point that the target can store. ``ordered``: a group is no run of columns, but those that
    the matrix's own order names; quantcli rounds to no such grid.
    """

    bits: int
    zero: Zero = "middle"
    strategy: Strategy = "group"
    group_size: int | None = None
    scale_dtype: str = "BF16"
    lowest_zero: int = 0
    ordered: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the same everywhere."""
        return self.zero == "middle"

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def whole(self) -> None:
        """A scale of the whole matrix beside the groups': there is none."""
        return None

    @property
    def needs_whole(self) -> bool:
        """Whether `bind` is needed first."""
        return False

    @property
    def label(self) -> str:
        """What a table calls the grid."""
        spread = f"g{self.group_size}" if self.strategy == "group" else self.strategy
        return f"int{self.bits} {spread}" + (" by activation" if self.ordered else "")

    @property
    def levels(self) -> Floats:
        """The values of codes without scales and zeros, in rising order."""
        return np.arange(self.top + 1, dtype=np.float32)

    @property
    def uniform(self) -> bool:
        """Whether levels are one apart."""
        return True

    @property
    def offset(self) -> float:
        """The level that stands for zero where the grid is symmetric."""
        return float(self.middle)

    @property
    def by_rows(self) -> bool:
        """Whether a row can be rounded without the others."""
        return self.strategy != "tensor"

    def groups(self, columns: int) -> int:
        """Scales for each row; ``group_size`` must divide ``columns``."""
        return columns // self.group_size if self.strategy == "group" and self.group_size else 1

    def bind(self, largest: float) -> IntegerGrid:
        """The grid of a matrix whose largest magnitude is ``largest``: the same."""
        return self

    def fit(
        self, rows: Floats, importance: Floats | None = None, search: Search = "minmax"
    ) -> tuple[Floats, NDArray[Any] | None]:
        """`fit_ranges`."""
        return fit_ranges(rows, self, importance, search)

    def fit_tensor(
        self,
        slabs: Callable[[], Iterable[Floats]],
        importance: Floats | None = None,
        search: Search = "minmax",
    ) -> tuple[Floats, NDArray[Any] | None]:
        """`fit_tensor`."""
        return fit_tensor(slabs, self, importance, search)

    def quantize(self, rows: Floats, scales: Floats, zeros: NDArray[Any] | None = None) -> Codes:
        """`quantize`."""
        return quantize(rows, scales, zeros, self)

    def dequantize(self, coded: GridCodes) -> Floats:
        """`dequantize`."""
        return dequantize(coded, self)

    def store(self, scales: Floats) -> Floats:
        """`store_scales`."""
        return store_scales(scales, self)

    def to_codes(self, ranks: Codes) -> Codes:
        """The codes of places in ``levels``: the same."""
        return ranks

    def to_ranks(self, codes: Codes) -> Codes:
        """Places in ``levels``."""
        return codes


@dataclass(frozen=True, slots=True)
class GridCodes:
    """A quantized matrix, or some rows of it.

    ``codes`` is uint8 (rows, columns). ``scales`` is float32 (rows, groups), (1, 1) for strategy
    "tensor", and exact in the grid's scale dtype. ``zeros`` has the scales' shape: int32 zero
    points for zero "integer", float32 edges for "edge", None for "middle". ``whole`` is NVFP4's
    scale of the whole matrix, in which the others are exact. ``order`` names the group of each
    column, int32, where the grid is "ordered".
    """

    codes: Codes
    scales: Floats
    zeros: NDArray[Any] | None = None
    whole: float | None = None
    order: NDArray[Any] | None = None

    def rows(self, start: int, stop: int) -> GridCodes:
        """The rows ``start:stop``, without a copy."""
        if len(self.scales) != len(self.codes):
            return GridCodes(self.codes[start:stop], self.scales, self.zeros, self.whole)
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return GridCodes(self.codes[start:stop], self.scales[start:stop], zeros, self.whole)


def fit_ranges(
    rows: Floats,
    grid: IntegerGrid,
    importance: Floats | None = None,
    search: Search = "minmax",
) -> tuple[Floats, NDArray[Any] | None]:
    """Scales and zeros (see `GridCodes`) of ``rows``, float32 (rows, columns).

    ``importance`` is one weight for each column, float32, used by the search "mse". For strategy
    "tensor" use `fit_tensor`. UnencodableError for a weight that is not finite, or too large for
    the scale's dtype.
    """
    count, columns = rows.shape
    groups = grid.groups(columns)
    scales = np.empty((count, groups), np.float32)
    zeros = None if grid.symmetric else np.empty((count, groups), _zero_dtype(grid))
    weights = None if importance is None else _group(importance[None], groups)
    for part in iterate_chunks(count, columns):
        refuse_infinite(rows[part], part.start)
        found = _fit(_group(rows[part], groups), grid, weights, search)
        _refuse_overflow(rows[part], part.start, found[0])
        scales[part] = found[0]
        if zeros is not None:
            zeros[part] = found[1]
    return scales, zeros


def fit_tensor(
    slabs: Callable[[], Iterable[Floats]],
    grid: IntegerGrid,
    importance: Floats | None = None,
    search: Search = "minmax",
) -> tuple[Floats, NDArray[Any] | None]:
    """The one scale and zero, each of shape (1, 1), of a matrix that is given in slabs of rows.

    ``slabs`` is called once for "minmax", twice for "mse". Errors as for `fit_ranges`.
    """
    low, high = np.float32(np.inf), np.float32(-np.inf)
    first = 0
    for rows in slabs():
        refuse_infinite(rows, first)
        low, high = min(low, rows.min()), max(high, rows.max())
        first += len(rows)
    factors = _factors(grid, search)
    if search == "minmax" and grid.zero == "middle":
        scales = _symmetric_range(np.full((1, 1), low), np.full((1, 1), high), grid)
        _refuse_wide(scales, low, high, grid)
        return scales, None
    ranges = [_range(np.full((1, 1), low), np.full((1, 1), high), f, grid) for f in factors]
    errors = np.zeros(len(factors))
    if len(factors) > 1:
        for rows in slabs():
            weights = None if importance is None else importance[None, None]
            for index, (scales, zeros) in enumerate(ranges):
                error = _errors(rows[:, None], *_spread(scales, zeros, len(rows)), grid, weights)
                errors[index] += error.sum(dtype=np.float64)
    scales, zeros = ranges[int(errors.argmin())]
    _refuse_wide(scales, low, high, grid)
    return scales, zeros


def quantize(rows: Floats, scales: Floats, zeros: NDArray[Any] | None, grid: IntegerGrid) -> Codes:
    """The nearest codes, uint8 (rows, columns), for scales and zeros of (rows or 1, groups)."""
    count, columns = rows.shape
    scales, zeros = _spread(scales, zeros, count)
    codes = np.empty((count, columns), np.uint8)
    for part in iterate_chunks(count, columns):
        values = _group(rows[part], scales.shape[1])
        zero = None if zeros is None else zeros[part]
        codes[part] = _nearest(values, scales[part], zero, grid).reshape(-1, columns)
    return codes


def dequantize(coded: GridCodes, grid: IntegerGrid) -> Floats:
    """The weights, float32 (rows, columns), that the codes stand for."""
    count, columns = coded.codes.shape
    scales, zeros = _spread(coded.scales, coded.zeros, count)
    if coded.order is not None:
        scales = scales[:, coded.order]
        zeros = None if zeros is None else zeros[:, coded.order]
    values = _group(coded.codes, scales.shape[1]).astype(np.float32)
    return _values(values, scales, zeros, grid).reshape(count, columns)


def encode(
    rows: Floats,
    grid: IntegerGrid,
    importance: Floats | None = None,
    search: Search = "minmax",
) -> GridCodes:
    """Ranges and codes of ``rows`` in one call; not for strategy "tensor"."""
    scales, zeros = fit_ranges(rows, grid, importance, search)
    return GridCodes(quantize(rows, scales, zeros, grid), scales, zeros)


def store_scales(scales: Floats, grid: IntegerGrid) -> Floats:
    """``scales``, or edges, as the target stores them, float32; none becomes zero."""
    return _stored(scales, grid)


# ---- one chunk: values are (rows, groups, group), scales and zeros (rows, groups)


# The square of a weight beyond 1e19 is infinite: an error larger than any other, and a slope that
# is not taken. Scales that are not finite are refused by the callers.
@np.errstate(over="ignore", invalid="ignore")
def _fit(
    values: Floats, grid: IntegerGrid, weights: Floats | None, search: Search
) -> tuple[Floats, NDArray[Any] | None]:
    low, high = values.min(-1), values.max(-1)
    factors = _factors(grid, search)
    if search == "minmax" and grid.zero == "middle":
        return _symmetric_range(low, high, grid), None
    scales, zeros = _range(low, high, factors[0], grid)
    if len(factors) == 1:
        return scales, zeros
    best = _errors(values, scales, zeros, grid, weights)

    def keep_better(found: tuple[Floats, NDArray[Any] | None]) -> None:
        error = _errors(values, *found, grid, weights)
        better = error < best
        best[better], scales[better] = error[better], found[0][better]
        if zeros is not None and found[1] is not None:
            zeros[better] = found[1][better]

    for factor in factors[1:]:
        keep_better(_range(low, high, factor, grid))
    for _ in range(_REFITS):
        keep_better(_refit(values, scales, zeros, grid, weights))
    return scales, zeros


def _factors(grid: IntegerGrid, search: Search) -> Floats:
    steps = 1 if search == "minmax" else _SHRINK_STEPS
    # Over a long row or a whole matrix the largest weight is further out.
    narrowest = _SHRINK_TO[grid.bits] ** (1 if grid.strategy == "group" else 2)
    return np.asarray(np.linspace(1, narrowest, steps), np.float32)


def _range(
    low: Floats, high: Floats, factor: np.float32, grid: IntegerGrid
) -> tuple[Floats, NDArray[Any] | None]:
    """Scales and zeros for weights from ``factor * low`` to ``factor * high``."""
    low, high = low * factor, high * factor
    top, middle = np.float32(grid.top), np.float32(grid.middle)
    if grid.zero == "edge":
        return _edges(low, high, grid)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if grid.zero == "middle":
        return _stored(np.maximum(high / (middle - 1), -low / middle), grid), None
    if grid.lowest_zero:
        least = np.float32(grid.lowest_zero)
        low = np.minimum(low, -high * least / (top - least))
    scales = _stored((high - low) / top, grid)
    zeros = np.clip(np.rint(-low / scales), grid.lowest_zero, grid.top)
    return scales, zeros.astype(np.int32)


def _symmetric_range(low: Floats, high: Floats, grid: IntegerGrid) -> Floats:
    """The references' rule: the largest magnitude at half a step beyond the largest code."""
    widest = np.asarray(np.maximum(high, -low), np.float32)
    return _stored(widest / np.float32(grid.top / 2), grid)


def _refuse_wide(scales: Floats, low: np.float32, high: np.float32, grid: IntegerGrid) -> None:
    if not np.isfinite(scales).all():
        raise UnencodableError(
            0, 0, float(max(high, -low)), f"overflows a {grid.scale_dtype} scale"
        )


def _edges(low: Floats, high: Floats, grid: IntegerGrid) -> tuple[Floats, Floats]:
    """Code 0 is the end of larger magnitude; the scale divides it, so one code is zero."""
    downward = np.abs(low) <= np.abs(high)
    scales = (high - low) / np.float32(grid.top)
    scales = np.where(downward, -scales, scales)
    edges = np.where(downward, high, low)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint(np.where(scales == 0, 0, edges / scales))
        scales = np.where(steps == 0, scales, edges / steps)
    return _stored(scales, grid), _rounded(np.where(steps == 0, 0, edges), grid)


def _refit(
    values: Floats,
    scales: Floats,
    zeros: NDArray[Any] | None,
    grid: IntegerGrid,
    weights: Floats | None,
) -> tuple[Floats, NDArray[Any] | None]:
    """The scales (and edges) that fit the chosen codes best, by weighted least squares."""
    codes = _nearest(values, scales, zeros, grid)
    weighted = np.broadcast_to(np.float32(1) if weights is None else weights, values.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        if grid.zero == "edge" and zeros is not None:
            total = weighted.sum(-1)
            center = (weighted * codes).sum(-1) / total
            mean = (weighted * values).sum(-1) / total
            away = codes - center[..., None]
            slopes = (weighted * away * (values - mean[..., None])).sum(-1) / (
                weighted * away * away
            ).sum(-1)
            found = np.where(np.isfinite(slopes), slopes, scales)
            edges = np.where(np.isfinite(slopes), mean - found * center, zeros)
            return _stored(found, grid), _rounded(edges, grid)
        away = codes - _zero_points(zeros, grid)
        slopes = (weighted * away * values).sum(-1) / (weighted * away * away).sum(-1)
    usable = np.isfinite(slopes) & (slopes > 0)
    return _stored(np.where(usable, slopes, scales), grid), zeros


def _nearest(
    values: Floats, scales: Floats, zeros: NDArray[Any] | None, grid: IntegerGrid
) -> Floats:
    scales = scales[..., None]
    if grid.zero == "edge" and zeros is not None:
        codes = np.rint((values - zeros[..., None]) / scales)
    else:
        codes = np.rint(values / scales) + _zero_points(zeros, grid)
    return np.asarray(np.clip(codes, 0, np.float32(grid.top)), np.float32)


def _values(codes: Floats, scales: Floats, zeros: NDArray[Any] | None, grid: IntegerGrid) -> Floats:
    if grid.zero == "edge" and zeros is not None:
        return np.asarray(codes * scales[..., None] + zeros[..., None], np.float32)
    return np.asarray((codes - _zero_points(zeros, grid)) * scales[..., None], np.float32)


def _zero_points(zeros: NDArray[Any] | None, grid: IntegerGrid) -> Any:
    return np.float32(grid.middle) if zeros is None else zeros[..., None].astype(np.float32)


def _errors(
    values: Floats,
    scales: Floats,
    zeros: NDArray[Any] | None,
    grid: IntegerGrid,
    weights: Floats | None,
) -> Floats:
    """Weighted squared error of each group."""
    missed = _values(_nearest(values, scales, zeros, grid), scales, zeros, grid) - values
    missed *= missed
    if weights is not None:
        missed *= weights
    return np.asarray(missed.sum(-1), np.float32)


def _rounded(values: Floats, grid: IntegerGrid) -> Floats:
    with np.errstate(over="ignore"):
        stored = np.asarray(values).astype(_DTYPES[grid.scale_dtype])
        return np.asarray(stored, np.float32)


def _stored(scales: Floats, grid: IntegerGrid) -> Floats:
    """Scales as the target stores them; never zero, which would divide by it."""
    kept = _rounded(scales, grid)
    least = np.where(scales < 0, -1, 1) * _SMALLEST[grid.scale_dtype]
    return np.asarray(np.where(kept == 0, np.where(scales == 0, 1, least), kept), np.float32)


# ---- shapes


def _zero_dtype(grid: IntegerGrid) -> Any:
    return np.float32 if grid.zero == "edge" else np.int32


def _group(values: NDArray[Any], groups: int) -> NDArray[Any]:
    return values.reshape(values.shape[0], groups, -1)


def _spread(
    scales: Floats, zeros: NDArray[Any] | None, count: int
) -> tuple[Floats, NDArray[Any] | None]:
    """One scale for all rows, where there is only one, seen from every row."""
    shape = (count, scales.shape[1])
    return (
        np.broadcast_to(scales, shape),
        None if zeros is None else np.broadcast_to(zeros, shape),
    )


def iterate_chunks(count: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Ranges of ``count`` rows that are worked on at once, in multiples of so many."""
    step = max(1, _CHUNK // max(1, columns * multiple)) * multiple
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def refuse_infinite(rows: Floats, first: int) -> None:
    """UnencodableError for the first weight that is not finite, ``first`` rows into its matrix."""
    good = np.isfinite(rows)
    if not good.all():
        row, column = (int(index) for index in np.argwhere(~good)[0])
        value = float(rows[row, column])
        raise UnencodableError(first + row, column, value, "is not a finite number")


def _refuse_overflow(rows: Floats, first: int, scales: Floats) -> None:
    good = np.isfinite(scales).all(-1)
    if not good.all():
        row = int(np.argmin(good))
        column = int(np.abs(rows[row]).argmax())
        value = float(rows[row, column])
        raise UnencodableError(first + row, column, value, "overflows the scale's dtype")
