"""What a calibration measured of every tensor's inputs, wherever the values come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from quantcli.errors import UsageError
from quantcli.formats.base import Floats
from quantcli.registry import near

MEAN, MIN_MAX, HISTOGRAM, CACHE = "mean", "min_max", "histogram", "kv_max"
NEEDS = ("mean_sq", "abs_max", "mean_abs", "hessian", MEAN, MIN_MAX, HISTOGRAM, CACHE)
"""Statistics by name; the first is always collected. `CACHE` is no statistic of inputs, but of the
keys and values that a layer puts into a cache."""


def check_needs(names: Iterable[str]) -> tuple[str, ...]:
    """The statistics asked for, in the order of `NEEDS`; UsageError for an unknown one."""
    asked = set(names)
    for name in sorted(asked - set(NEEDS)):
        guess = near(name, NEEDS, most=1)
        raise UsageError(
            f"there is no statistic {name!r}",
            hint=f"did you mean {guess[0]}?" if guess else f"there are {', '.join(NEEDS)}",
        )
    return tuple(name for name in NEEDS if name == "mean_sq" or name in asked)


class InputStatistics(Protocol):
    """Statistics of the inputs x of a GGUF tensor's matrix, x having one value per column."""

    def count(self, name: str, matrix: int = 0) -> int:
        """Inputs that were seen."""

    def hessian(self, name: str, matrix: int = 0) -> Floats:
        """The mean of x x^T, float32 of shape (columns, columns)."""

    def abs_max(self, name: str, matrix: int = 0) -> Floats:
        """The largest |x|, float32 of shape (columns,)."""

    def mean_abs(self, name: str, matrix: int = 0) -> Floats:
        """The mean |x|, float32 of shape (columns,)."""
