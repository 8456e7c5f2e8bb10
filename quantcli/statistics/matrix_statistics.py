"""The statistics of one matrix: the Hessian of its inputs, the Fisher factor of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from quantcli.formats.base import Floats
from quantcli.statistics.hessian import WIDE, Hessian
from quantcli.statistics.losses import ErrorReader, Judge, Loss
from quantcli.statistics.quadratic_loss import quadratic_loss
from quantcli.statistics.symmetric_mean import Mean

if TYPE_CHECKING:
    from quantcli.statistics.output_fisher import OutputFisher
    from quantcli.statistics.sketched_loss import LossSketch


@dataclass(frozen=True)
class Drift:
    """How a quantized prefix's inputs x^ differ from the original x.

    ``correction`` is C H^-1 with C the fitted mean of (x - x^) x^T^, and ``held_out`` that mean on
    inputs held out from the fit.
    """

    correction: Floats
    held_out: Floats

    def correct(self, rows: Floats, inputs: Mean) -> Floats:
        """The best weights along W + s W C H^-1, 0 <= s <= 1, for the held-out ``inputs``.

        The error of the original outputs is quadratic in s; a correction that only fits the
        calibration's own windows gets a small one.
        """
        change = rows @ self.correction
        slope = float(np.einsum("ij,ij->", rows @ self.held_out, change, dtype=np.float64))
        curvature = quadratic_loss(change, inputs)
        share = min(1.0, max(0.0, slope / curvature)) if curvature > 0 else 0.0
        return np.asarray(rows + np.float32(share) * change, np.float32)


@dataclass(frozen=True)
class MatrixStatistics:
    """Statistics of one matrix: the factored fit, and means of x x^T over its inputs.

    ``held_out`` judges; it is ``fit`` where no input was held out. ``outputs`` is fitted alone.
    """

    hessian: Hessian
    fit: Mean
    held_out: Mean
    drift: Drift | None = None
    """Where a quantized prefix changes what the weights should be."""
    outputs: OutputFisher | None = None
    """The Fisher information of the outputs; None where all count alike."""
    _sketches: list[LossSketch] = field(default_factory=list, repr=False, compare=False)
    """That of ``held_out`` once it was asked for, which matrices of the same inputs share."""

    @property
    def importance(self) -> Floats:
        """Mean squares of the inputs, one per column."""
        return np.ascontiguousarray(self.fit.diagonal(), np.float32)

    def cost(self, errors: Floats, outputs: OutputFisher | None) -> float:
        """``tr(F E H E^T)`` for the held-out H: of ``outputs``' F, or of the identity."""
        if outputs is None:
            return quadratic_loss(errors, self.held_out)
        return quadratic_loss(errors, self.held_out, outputs.strips)

    def judge(self, rows: int, outputs: OutputFisher | None) -> Judge:
        """What tells `cost` of errors of so many rows, by an estimate where the matrix is wide."""
        if self.held_out.shape[0] < WIDE:
            return ExactJudge(self, outputs)
        from quantcli.statistics.output_fisher import cut_strips
        from quantcli.statistics.sketched_loss import LossSketch, SketchingJudge

        if not self._sketches:
            self._sketches.append(LossSketch(self.held_out, self.hessian))
        means = None if outputs is None else outputs.means
        return SketchingJudge(self._sketches[0], cut_strips(rows), means)


@dataclass(frozen=True)
class ExactJudge:
    """A `Judge` that estimates nothing."""

    statistics: MatrixStatistics
    outputs: OutputFisher | None

    def cost(self, read: ErrorReader) -> float:
        """`MatrixStatistics.cost`."""
        return self.statistics.cost(read(slice(None)), self.outputs)

    def take(self, read: ErrorReader) -> Loss:
        """The same as a loss."""
        return Loss(self.cost(read))

    def settle(self, taken: Sequence[Loss]) -> list[Loss]:
        """What was taken."""
        return list(taken)
