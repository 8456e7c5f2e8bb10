"""What a layer put into a key-value cache."""

from __future__ import annotations

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
