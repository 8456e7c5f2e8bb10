"""What a layer put into a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CacheTotals:
    """The largest magnitudes of keys and values (heads,), and how many ``tokens`` (1,) there were.

    There is one head where they are not told apart.
    """

    tokens: NDArray[np.int64]
    keys: NDArray[np.float64]
    values: NDArray[np.float64]


def add_caches(parts: Sequence[CacheTotals | None]) -> CacheTotals | None:
    """What several saw of one layer; None where none saw anything."""
    seen = [part for part in parts if part is not None]
    if not seen:
        return None
    return CacheTotals(
        np.asarray(sum(part.tokens for part in seen)),
        np.maximum.reduce([part.keys for part in seen]),
        np.maximum.reduce([part.values for part in seen]),
    )
