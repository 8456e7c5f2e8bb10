"""Losses that are known or estimated, and what tells them of some errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Floats

SURE = 4.0
"""Standard errors by which two estimates have to differ for their order to be known."""
CLOSE = 0.02
"""Standard error of a loss that may stand for it, as a share."""


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss: ``exact``, and what each probe says of the rest (none: there is no rest)."""

    exact: float
    probes: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def value(self) -> float:
        """The loss, or its estimate."""
        return self.exact + (float(self.probes.mean()) if self.probes.size else 0.0)

    @property
    def error(self) -> float:
        """The standard error of `value`; 0 where it is exact."""
        return float(self.probes.std(ddof=1)) / self.probes.size**0.5 if self.probes.size else 0.0

    @property
    def is_close(self) -> bool:
        """Whether the estimate is good enough to be told."""
        return self.error <= CLOSE * self.value

    def is_apart(self, other: Loss) -> bool:
        """Whether it is known which of two is less, by the same probes."""
        if not self.probes.size:
            return True
        between = Loss(self.exact - other.exact, self.probes - other.probes)
        return abs(between.value) > SURE * between.error


ErrorReader = Callable[[slice], Floats]
"""Errors of some rows of a matrix, (rows, columns)."""


class Judge(Protocol):
    """What tells the losses of errors of one matrix."""

    def cost(self, read: ErrorReader) -> float:
        """The exact loss of one."""

    def take(self, read: ErrorReader) -> Any:
        """What is kept of some errors until `settle`."""

    def settle(self, taken: Sequence[Any]) -> list[Loss]:
        """The losses of what was taken."""
