"""The Hessian of a layer's output error, and its factor for error feedback.

For inputs x of a weight matrix W the squared error of the output is ``tr(E H E^T)`` with
``E = W - Q`` and ``H = mean of x x^T``. With ``H = (I + U) D (I + U)^T``, U strictly upper
triangular and D diagonal, it is ``sum_j D_j |W_j + sum_{i<j} E_i U_ij - Q_j|^2``: column j is best
rounded from its own weights plus the errors of the columns before it. This is the form of QuIP
(arXiv:2307.13304), equivalent to GPTQ's (arXiv:2210.17323), and needs no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.base import Floats

ColumnOrder = NDArray[np.int64]

DAMPING = 0.05
"""Added to the diagonal, as a share of its mean. On text like the calibration's a fifth of it does
as well; on other text a small one costs far more than a large one at two and three bits."""
WIDE = 2048
"""From this many columns on the factorisation is in float32: half the memory and the time."""
RAISED_DAMPING = 10.0
MOST_DAMPING = 10.0


@dataclass(frozen=True, eq=False)
class HessianBlock:
    """The LDL factor of some neighbouring columns: I + U and D of these alone."""

    factor: Floats
    pivots: Floats
    _metrics: dict[int, Floats] = field(default_factory=dict)

    def metric(self, width: int) -> Floats:
        """For each unit of ``width`` columns its own (I + U) D (I + U)^T, shape (columns, width).

        It weighs a unit's errors that later columns cannot compensate (the Schur complement).
        """
        if width not in self._metrics:
            self._metrics[width] = self._metric(width)
        return self._metrics[width]

    def _metric(self, width: int) -> Floats:
        units = len(self.pivots) // width
        tiled = self.factor.reshape(units, width, units, width)
        own = tiled[np.arange(units), :, np.arange(units), :]
        metric = (own * self.pivots.reshape(units, 1, width)) @ own.transpose(0, 2, 1)
        return np.ascontiguousarray(metric.reshape(-1, width), np.float32)


@dataclass(frozen=True, eq=False)
class Hessian:
    """A damped Hessian, shape (columns, columns), float32, and its factor.

    ``factor`` is I + U and ``pivots`` is D, shape (columns,), for the columns in ``order`` (None:
    as they are); ``damping`` is the share that was needed for the matrix to be positive definite.
    """

    matrix: Floats
    factor: Floats
    pivots: Floats
    damping: float
    order: ColumnOrder | None = None
    _parts: dict[tuple[int, int], HessianBlock] = field(default_factory=dict)
    _together: dict[int, Hessian] = field(default_factory=dict)

    def part(self, columns: slice) -> HessianBlock:
        """What concerns ``columns``, by their places in the order."""
        key = columns.start, columns.stop
        if key not in self._parts:
            factor = np.ascontiguousarray(self.factor[columns, columns])
            self._parts[key] = HessianBlock(factor, self.pivots[columns])
        return self._parts[key]

    def own(self, columns: slice) -> Floats:
        """The matrix of some neighbouring columns alone, contiguous."""
        return np.ascontiguousarray(self.matrix[columns, columns])

    def slope(self, errors: Floats, columns: slice) -> Floats:
        """``errors`` (n, all columns) times some neighbouring columns of the matrix."""
        from quantcli.layerwise.products import product

        return product(errors, self.matrix[:, columns])

    def follow(self, errors: Floats) -> Slopes:
        """`slope` of one block of columns after the other, while ``errors`` change; by one thread.

        Not out of the columns' own order.
        """
        return Slopes(self, errors)

    def ahead(self, errors: Floats, columns: slice) -> Floats:
        """What the errors of the columns before ``columns`` in the order ask of these.

        ``errors`` (n, at least the columns before) are in the order too.
        """
        from quantcli.layerwise.products import product

        first = columns.start
        if first == 0:
            return np.zeros((len(errors), columns.stop), np.float32)
        return product(errors[:, :first], self.factor[:first, columns])

    def spread(self, values: Floats) -> Floats:
        """L times ``values`` (columns, few), for a root L of the matrix: ``L L^T`` is it."""
        from quantcli.layerwise.products import product

        found = product(self.factor, np.sqrt(self.pivots)[:, None] * values)
        return found if self.order is None else found[np.argsort(self.order)]

    def gather(self, values: Floats) -> Floats:
        """The inverse of L^T, of `spread`, times ``values`` (columns, few)."""
        import torch

        from quantcli.layerwise.steady import run_tasks

        found: list[Floats] = []

        def solve() -> None:
            factor, scaled = (
                torch.from_numpy(part)
                for part in (self.factor, values / np.sqrt(self.pivots)[:, None])
            )
            solved = torch.linalg.solve_triangular(
                factor.T, scaled, upper=False, unitriangular=True
            )
            found.append(solved.numpy())

        run_tasks([solve])
        return found[0] if self.order is None else found[0][np.argsort(self.order)]

    def keep_together(self, width: int) -> Hessian:
        """This Hessian in an order that leaves units of ``width`` columns whole.

        The units with the largest mean square come first, if it has been the columns' before.
        """
        if self.order is None or width == 1:
            return self
        if width not in self._together:
            self._together[width] = self._keep_together(width)
        return self._together[width]

    def _keep_together(self, width: int) -> Hessian:
        loud = self.matrix.diagonal().reshape(-1, width).sum(axis=1)
        units = np.argsort(-loud, kind="stable")
        order = (units[:, None] * width + np.arange(width)).reshape(-1)
        factor, pivots = _factor(self.matrix.astype(np.float64), order)
        return Hessian(self.matrix, factor, pivots, self.damping, order)


class Slopes:
    """``errors`` (n, all columns), which are changed here, times a Hessian, from left to right."""

    def __init__(self, hessian: Hessian, errors: Floats) -> None:
        self._hessian = hessian
        self.errors = errors

    def of(self, columns: slice) -> Floats:
        """The slope of the next columns; all before them have changed."""
        from quantcli.layerwise.products import multiply

        return multiply(self.errors, np.ascontiguousarray(self._hessian.matrix[:, columns]))

    def change(self, columns: slice, change: Floats) -> None:
        """Add to the errors of these columns."""
        self.errors[:, columns] += change


def _factor(values: NDArray[Any], order: ColumnOrder | None) -> tuple[Floats, Floats]:
    """I + U and D of a positive definite matrix in an order; LinAlgError where it is not."""
    # Several times as fast as NumPy's; options are read before it is known whether it is there.
    import torch

    from quantcli.layerwise.steady import cholesky

    # The reversed matrix's lower factor, turned round, is the upper one from the right.
    turned = (
        values[::-1, ::-1].copy() if order is None else values[np.ix_(order[::-1], order[::-1])]
    )
    try:
        lower = cholesky(torch.from_numpy(turned))
    except torch.linalg.LinAlgError as failed:
        raise np.linalg.LinAlgError("not positive definite") from failed
    upper = lower.flip(0, 1)
    diagonal = upper.diagonal().clone()
    pivots: Floats = (diagonal * diagonal).float().numpy()
    factor: Floats = upper.div_(diagonal).float().numpy()
    return factor, pivots


def fill_dead(diagonal: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """A Hessian's diagonal with its mean, which is given too, where a column was always zero.

    SourceError for a value that is not finite.
    """
    average = float(diagonal.mean())
    if not np.isfinite(average):
        raise SourceError("a Hessian holds a value that is not finite")
    if average <= 0:
        average = 1.0
    return np.where(diagonal > 0, diagonal, average), average


def raise_damping(damping: float) -> float:
    """The next damping after one that was too small; SourceError where none is left to try."""
    damping *= RAISED_DAMPING
    if damping > MOST_DAMPING:
        raise SourceError("a Hessian is not positive definite") from None
    return damping


def prepare_hessian(
    mean: NDArray[np.floating[Any]], damping: float = DAMPING, order: str = "natural"
) -> Hessian:
    """Damp and factor a mean of x x^T, shape (columns, columns).

    A column that was always zero gets the mean of the diagonal. Where the factorisation fails the
    damping is raised tenfold until it succeeds; SourceError when even ten times the mean diagonal
    does not help, which takes values that are not finite.
    """
    wide = mean.shape[0] >= WIDE
    if wide and order == "natural":
        from quantcli.statistics.panel_hessian import prepare_panels

        return prepare_panels(lambda rows: np.asarray(mean[rows], np.float32), len(mean), damping)
    values: NDArray[Any] = np.array(mean, np.float32 if wide else np.float64)
    alive, average = fill_dead(values.diagonal().astype(np.float64))
    sorting = np.argsort(-alive, kind="stable") if order == "activation" else None
    while True:
        np.fill_diagonal(values, alive + damping * average)
        try:
            factor, pivots = _factor(values, sorting)
            break
        except np.linalg.LinAlgError:
            damping = raise_damping(damping)
    return Hessian(np.asarray(values, np.float32), factor, pivots, damping, sorting)


def output_error(errors: Floats, mean: NDArray[np.floating[Any]]) -> float:
    """``tr(E H E^T)``: the summed squared error of the outputs, per input."""
    total = 0.0
    # A share of the rows at a time, so that float64 is never held for all of them.
    for rows in np.array_split(errors, max(1, errors.size // (1 << 24))):
        total += float(np.einsum("ij,ij->", rows @ mean.astype(np.float32), rows, dtype=np.float64))
    return total
