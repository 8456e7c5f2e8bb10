"""``tr(F E H E^T)`` of a wide matrix, estimated from a few hundred columns of a sketch.

The exact loss takes as much as rounding does. Most of it lies along few directions, and what is
left is spread over many, so the trace is cut in two (as Hutch++ does, arXiv:2010.09649). With Q an
orthonormal basis of H's leading directions and P = Q Q^T,

    H = (P H + H P - P H P) + (I - P) H (I - P),

and of ``M = E^T F E`` the first part's trace ``tr(M Q (2 H Q - Q (Q^T H Q))^T)`` is exact. The
second one's is the mean of ``(E (I - P) L w)^T F (E (I - P) H L^-T w)`` over random signs w, for
any L. It is a root of the fitted H: feedback leaves errors that are large where H is small, and
with plain probes these would meet what is large in H. F is cut the same way: few directions can
hold much of it, too.

The standard error, relative to the loss, is about ``sqrt(2 / PROBES)`` of the part of the loss that
is left, over the root of how many directions share it. It is known from how the probes differ, too
(`Loss.error`). Probes are the same in every run and for all errors of one matrix, so two losses
are compared by the differences of their probes, whose error is smaller.

For n rows and C columns an estimate takes n C + n^2 multiplications some hundred times instead of
n C^2 / 2 + n^2 C; the mean is read twice for its sketch and once for each `settle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from quantcli.formats.base import Floats
from quantcli.layerwise.products import multiply, product, shares
from quantcli.layerwise.steady import run_tasks
from quantcli.statistics.hessian import Hessian
from quantcli.statistics.losses import ErrorReader, Loss
from quantcli.statistics.quadratic_loss import quadratic_loss
from quantcli.statistics.symmetric_mean import Mean, read_rows

PROBES = 128
"""Random columns."""
LEADING = 64
"""Directions of H that are taken exactly."""
LEADING_OUTPUTS = 32
"""Directions of each strip of F that are."""
_ROWS = 256
_SEED = 20


@dataclass(frozen=True, eq=False)
class _Factors:
    """``left @ right.T`` is about a symmetric matrix: exactly so in the first `leading` columns,
    the others are probes of the rest, which count for their mean."""

    left: Floats
    right: Floats
    leading: int


@dataclass(frozen=True, eq=False)
class SketchedErrors:
    """What is kept of some errors until `settle`: the products that H is still missing from.

    ``beside`` (columns, directions of all strips) is E^T U, ``against`` E^T (2 F U - U (U^T F U)).
    """

    beside: Floats
    against: Floats
    rest: Loss


@dataclass(frozen=True, eq=False)
class OutputSketch:
    """Some ``rows`` of a matrix that have one F: ``fisher`` (rows, rows), U, ``toward`` is
    2 F U - U (U^T F U)."""

    rows: slice
    fisher: Floats
    basis: Floats
    toward: Floats

    @classmethod
    def of(cls, rows: slice, fisher: Floats) -> OutputSketch:
        """Find the leading directions."""
        count = len(fisher)
        draw = np.random.default_rng(_SEED)
        few = draw.standard_normal((count, min(LEADING_OUTPUTS, -(-count // 4))), np.float32)
        basis = _span(product(fisher, few))
        along = product(fisher, basis)
        return cls(rows, fisher, basis, 2 * along - product(basis, product(basis.T, along)))

    def leave(self, values: Floats) -> Floats:
        """What of ``values`` (rows, few) lies in none of the leading directions."""
        return np.asarray(values - product(self.basis, product(self.basis.T, values)))


class LossSketch:
    """Losses of the errors of one wide matrix, for H ``mean`` (columns, columns).

    ``fitted`` is the Hessian of the same inputs, or of others like these.
    """

    def __init__(self, mean: Mean, fitted: Hessian) -> None:
        self.mean = mean
        columns = mean.shape[0]
        draw = np.random.default_rng(_SEED)
        leading = min(LEADING, columns // 4)
        basis = _span(self._times(draw.standard_normal((columns, leading), np.float32)))
        signs = draw.integers(0, 2, (columns, PROBES)).astype(np.float32) * 2 - 1
        left = fitted.spread(signs)
        left = np.concatenate([basis, left - product(basis, product(basis.T, left))], axis=1)
        along = self._times(np.concatenate([basis, fitted.gather(signs)], axis=1))
        right = along - product(basis, product(basis.T, along))
        right[:, :leading] += along[:, :leading]
        self._factors = _Factors(left, right, leading)

    def take(self, read: ErrorReader, outputs: Sequence[OutputSketch | slice]) -> SketchedErrors:
        """Of errors, strip by strip; a slice of rows has the identity for its F."""
        factors = self._factors
        both = np.concatenate([factors.left, factors.right], axis=1)
        columns, width = factors.left.shape
        found = np.zeros(width)
        beside = against = [np.empty((columns, 0), np.float32)]
        for own in outputs:
            errors = read(own if isinstance(own, slice) else own.rows)
            left, right = np.split(product(errors, both), 2, axis=1)
            if isinstance(own, OutputSketch):
                left, right = product(own.fisher, own.leave(left)), own.leave(right)
                few = own.basis.shape[1]
                along = product(errors.T, np.concatenate([own.basis, own.toward], axis=1))
                beside, against = [*beside, along[:, :few]], [*against, along[:, few:]]
            found += np.einsum("ij,ij->j", left, right, dtype=np.float64)
        rest = Loss(float(found[: factors.leading].sum()), found[factors.leading :])
        return SketchedErrors(np.concatenate(beside, axis=1), np.concatenate(against, axis=1), rest)

    def settle(self, taken: Sequence[SketchedErrors]) -> list[Loss]:
        """The losses of what was taken, by one look at H."""
        if not any(one.beside.size for one in taken):
            return [one.rest for one in taken]
        along = self._times(np.concatenate([one.beside for one in taken], axis=1))
        found = []
        for own, one in zip(np.split(along, len(taken), axis=1), taken, strict=True):
            exact = float(np.einsum("ij,ij->", own, one.against, dtype=np.float64))
            found.append(Loss(one.rest.exact + exact, one.rest.probes))
        return found

    def _times(self, values: Floats) -> Floats:
        """H times ``values`` (columns, few)."""
        out = np.empty(values.shape, np.float32)

        def share(rows: slice) -> None:
            out[rows] = multiply(read_rows(self.mean, rows), values)

        run_tasks([partial(share, rows) for rows in shares(len(out), _ROWS)])
        return out


class SketchingJudge:
    """A `quantcli.statistics.losses.Judge` of wide matrices, by a sketch of H.

    Errors are read by ``cuts`` of rows; ``strips`` has F by these, without it F is the identity.
    """

    def __init__(
        self, sketch: LossSketch, cuts: Sequence[slice], strips: Sequence[Floats] | None
    ) -> None:
        self._sketch, self._cuts, self._strips = sketch, cuts, strips
        self._outputs: Sequence[OutputSketch | slice] = cuts
        if strips is not None:
            self._outputs = [OutputSketch.of(*one) for one in zip(cuts, strips, strict=True)]

    def cost(self, read: ErrorReader) -> float:
        """The exact loss, a sum over the cuts."""
        fishers: Sequence[Floats | None] = self._strips or [None] * len(self._cuts)
        total = 0.0
        for cut, fisher in zip(self._cuts, fishers, strict=True):
            errors = read(cut)
            own = None if fisher is None else [(slice(0, len(errors)), fisher)]
            total += quadratic_loss(errors, self._sketch.mean, own)
        return total

    def take(self, read: ErrorReader) -> SketchedErrors:
        """Sketch some errors."""
        return self._sketch.take(read, self._outputs)

    def settle(self, taken: Sequence[SketchedErrors]) -> list[Loss]:
        """Estimate the losses of what was taken."""
        return self._sketch.settle(taken)


def _span(columns: Floats) -> Floats:
    """An orthonormal basis of what some columns span."""
    found: list[Floats] = []

    def factor() -> None:
        basis, _ = torch.linalg.qr(torch.from_numpy(columns).double())
        found.append(basis.float().numpy())

    # One thread, so that the last bits do not depend on how many there are.
    run_tasks([factor])
    return np.ascontiguousarray(found[0])
