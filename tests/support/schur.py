"""What of some columns' error later ones cannot make good, from the Hessian itself."""

from __future__ import annotations

import numpy as np


def remaining(hessian: np.ndarray, columns: int) -> np.ndarray:
    """The Schur complement of the first ``columns``: later ones may take any value for it."""
    full = hessian.astype(np.float64)
    first, later = slice(0, columns), slice(columns, None)
    made_good = full[first, later] @ np.linalg.solve(full[later, later], full[later, first])
    return (full[first, first] - made_good).astype(np.float32)
