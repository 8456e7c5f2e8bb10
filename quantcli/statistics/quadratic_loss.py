"""``tr(F E H E^T)``, the loss that an error E of the weights costs.

H is symmetric, so of each pair of columns one product is enough: a panel of columns is multiplied
with itself and what comes after it, and the latter counts twice. For E of n rows and C columns that
is n C^2 multiplications, and n^2 C with F; besides E, 4 KiB (n + C) of memory are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from quantcli.formats.base import Floats
from quantcli.statistics.symmetric_mean import Mean, read_rows

_PANEL = 512


def quadratic_loss(
    errors: Floats, mean: Mean, fisher: Sequence[tuple[slice, Floats]] | None = None
) -> float:
    """The loss of ``errors`` (rows, columns), for H ``mean`` (columns, columns).

    ``fisher`` has F by strips of rows that are not tied to other ones, each (strip, strip); without
    it F is the identity.
    """
    # Options are read before it is known whether torch is there.
    from quantcli.layerwise.products import TILE, multiply, shares
    from quantcli.layerwise.steady import run_tasks

    count, columns = errors.shape
    whole: list[tuple[slice, Floats | None]] = [(slice(0, count), None)]
    strips = whole if fisher is None else list(fisher)
    total = 0.0
    for start in range(0, columns, _PANEL):
        own = slice(start, min(start + _PANEL, columns))
        panel = np.array(read_rows(mean, own)[:, start:], order="C")
        width = own.stop - start
        panel[:, :width] *= np.float32(0.5)
        for strip, weights in strips:
            rounds = shares(strip.stop - strip.start, TILE)
            found = [0.0] * len(rounds)
            lost = np.array(errors[strip, own], order="C")

            def share(
                number: int, rows: slice, strip: slice = strip, weights: Floats | None = weights,
                lost: Floats = lost, found: list[float] = found, panel: Floats = panel,
                start: int = start,
            ) -> None:  # fmt: skip
                part = slice(strip.start + rows.start, strip.start + rows.stop)
                product = multiply(errors[part, start:], panel.T)
                weighed = lost[rows] if weights is None else multiply(weights[rows], lost)
                found[number] = float(np.einsum("ij,ij->", product, weighed, dtype=np.float64))

            run_tasks([partial(share, *one) for one in enumerate(rounds)])
            total += 2 * sum(found)
    return total
