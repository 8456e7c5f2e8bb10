"""Statistics of a tensor's weights, gathered slab by slab and merged exactly.

What decides how much a quantizer loses is how far the large weights stand from the rest, and
where. So besides the moments this counts *outliers*: weights larger in magnitude than six times
the root mean square of their own row. The row is the yardstick because blocks never cross rows, so
it is the outlier's neighbours in the row whose steps it coarsens; and since a row is always whole
in a slab, the count is exact in one pass. (In Gaussian weights 2 in 10^9 are that large. A row of
fewer than 37 weights can have none, as one weight cannot exceed the square root of their number
times the root mean square.) The columns are the layer's input channels; their largest magnitudes
against the median column show the channels that activation-aware methods would scale.

Sums are float64. Two sets of moments are merged by the pairwise formulas for the third and fourth
central moment (Pébay, SAND2008-6212), which lose nothing when the mean is far from zero, as sums
of powers would. NaN and infinities are counted and left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTLIER_RATIO = 6.0
"""An outlier is larger than this many times the root mean square of its row."""

_CHUNK = 1 << 18
"""Weights that are worked on at once: two megabytes of float64 stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, extremes, mean and the sums of the 2nd, 3rd and 4th powers of deviations from it."""

    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the population; NaN when there are no values."""
        return math.sqrt(self.m2 / self.count) if self.count else math.nan

    @property
    def kurtosis(self) -> float:
        """Fourth standardised moment: 3 for a Gaussian; NaN when all values are equal."""
        square = self.m2 * self.m2
        return self.count * self.m4 / square if square > 0 else math.nan

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together."""
        if not self.count or not other.count:
            return self if self.count else other
        a, b = self.count, other.count
        n = a + b
        delta = other.mean - self.mean
        step = delta / n
        m2 = self.m2 + other.m2 + delta * step * a * b
        m3 = (
            self.m3
            + other.m3
            + delta * step * step * a * b * (a - b)
            + 3 * step * (a * other.m2 - b * self.m2)
        )
        m4 = (
            self.m4
            + other.m4
            + delta * step * step * step * a * b * (a * a - a * b + b * b)
            + 6 * step * step * (a * a * other.m2 + b * b * self.m2)
            + 4 * step * (a * other.m3 - b * self.m3)
        )
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Moments(n, low, high, self.mean + step * b, m2, m3, m4)


def moments_of(values: NDArray[np.float64]) -> Moments:
    """The moments of finite values, any shape; sums that overflow come out infinite or NaN."""
    if not values.size:
        return Moments()
    mean = float(values.mean())
    deviation = values - mean
    square = deviation * deviation
    deviation *= square
    m2, m3 = float(square.sum()), float(deviation.sum())
    square *= square
    return Moments(
        values.size, float(values.min()), float(values.max()), mean, m2, m3, float(square.sum())
    )


@dataclass(frozen=True, slots=True)
class Channel:
    """An input channel that stands out."""

    index: int
    abs_max: float
    ratio: float
    """Its largest magnitude over the median channel's."""
    outliers: int


@dataclass(frozen=True, slots=True)
class WeightStats:
    """One tensor's statistics, or those of some of its rows; ``merge`` joins disjoint rows.

    ``abs_max`` and ``outliers`` have one entry for each column.
    """

    moments: Moments
    nonfinite: int
    abs_max: NDArray[np.float64]
    outliers: NDArray[np.int64]

    @property
    def outlier_count(self) -> int:
        """Weights larger than `OUTLIER_RATIO` times the root mean square of their row."""
        return int(self.outliers.sum())

    @property
    def outlier_share(self) -> float:
        """Outliers among the finite weights, 0 to 1."""
        return self.outlier_count / self.moments.count if self.moments.count else 0.0

    @property
    def median_abs_max(self) -> float:
        """The median over the columns of their largest magnitude."""
        return float(np.median(self.abs_max)) if self.abs_max.size else math.nan

    def channels(self, most: int) -> list[Channel]:
        """The columns with the largest magnitudes, largest first; none where the median is 0."""
        median = self.median_abs_max
        if not median > 0:
            return []
        # A stable sort of the negated values keeps equal columns in their own order.
        order = np.argsort(-self.abs_max, kind="stable")[:most]
        return [
            Channel(
                int(i),
                float(self.abs_max[i]),
                float(self.abs_max[i]) / median,
                int(self.outliers[i]),
            )
            for i in order
        ]

    def merge(self, other: WeightStats) -> WeightStats:
        """The statistics of both sets of rows together."""
        return WeightStats(
            self.moments.merge(other.moments),
            self.nonfinite + other.nonfinite,
            np.maximum(self.abs_max, other.abs_max),
            self.outliers + other.outliers,
        )


def empty_stats(columns: int) -> WeightStats:
    """What no rows of ``columns`` weights amount to: the neutral element of `merge`."""
    zeros = np.zeros(columns, dtype=np.float64)
    return WeightStats(Moments(), 0, zeros, zeros.astype(np.int64))


def measure_rows(rows: NDArray[Any]) -> WeightStats:
    """Statistics of whole rows of any float dtype, shape (rows, columns)."""
    count, columns = rows.shape
    total = empty_stats(columns)
    if columns == 0:
        return total
    step = max(1, _CHUNK // columns)
    for start in range(0, count, step):
        # Float64 weights near the end of the range overflow when squared, which is no mishap here.
        with np.errstate(over="ignore", invalid="ignore"):
            total = total.merge(_measure(_as_double(rows[start : start + step])))
    return total


def _as_double(rows: NDArray[Any]) -> NDArray[np.float64]:
    if rows.dtype.name == "bfloat16":
        # A bfloat16 is the upper half of a float32; shifting is far quicker than casting.
        wide = rows.view(np.uint16).astype(np.uint32)
        wide <<= 16
        rows = wide.view(np.float32)
    return rows.astype(np.float64)


def _measure(rows: NDArray[np.float64]) -> WeightStats:
    finite = np.isfinite(rows)
    nonfinite = rows.size - int(np.count_nonzero(finite))
    moments = moments_of(rows[finite] if nonfinite else rows)
    magnitude = np.abs(rows)
    if nonfinite:
        magnitude[~finite] = 0.0
    squares = np.einsum("ij,ij->i", magnitude, magnitude)
    limit = OUTLIER_RATIO * np.sqrt(squares / np.maximum(1, finite.sum(axis=1)))
    outliers = np.zeros(rows.shape[1], dtype=np.int64)
    # Few rows hold an outlier at all, and only those are looked at weight by weight.
    hit = magnitude.max(axis=1) > limit
    if hit.any():
        outliers += (magnitude[hit] > limit[hit, None]).sum(axis=0)
    return WeightStats(moments, nonfinite, magnitude.max(axis=0), outliers)
