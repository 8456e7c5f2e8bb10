"""Groups of weights that are points of a codebook grid, before the kernels that choose them.

A unit is chosen at once: a group, or eight weights where the number of minus signs among
them has to be even.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from quantcli.formats.base import Floats
from quantcli.formats.codebook_lattice import CodebookLattice
from quantcli.formats.lattice import Parts
from quantcli.formats.search import Codes
from quantcli.rounding.kernels import VectorKernels
from quantcli.statistics.hessian import HessianBlock
from quantcli.workers import Workers

SPREAD = 3
"""How many odd numbers below and above the encoder's scale are tried."""


@dataclass(frozen=True)
class VectorCodebook:
    """A codebook's lattice, and its kernels."""

    lattice: CodebookLattice
    kernels: VectorKernels
    squares: Floats
    """The points' squared levels, shape (points, group)."""

    @classmethod
    def of(cls, lattice: CodebookLattice) -> VectorCodebook:
        """Those of ``lattice``."""
        points = lattice.points
        first, one = np.unique(points[:, : lattice.group // 2], axis=0, return_inverse=True)
        second, two = np.unique(points[:, lattice.group // 2 :], axis=0, return_inverse=True)
        patterns = np.stack([one, two], axis=1).astype(np.uint8)
        kernels = VectorKernels(
            first, second, patterns, lattice.signs, lattice.apart, lattice.group, lattice.sub,
            lattice.block, lattice.scale_range,
        )  # fmt: skip
        return cls(lattice, kernels, points * points)

    @property
    def group(self) -> int:
        """Weights under one code."""
        return self.lattice.group

    @property
    def width(self) -> int:
        """Weights of a unit."""
        return 8 if self.lattice.even_signs else self.lattice.group

    @property
    def together(self) -> int:
        """Weights that cannot be rounded apart: a unit, or a run that shares its shift."""
        return self.lattice.sub if self.lattice.apart else self.width

    def _norms(self, diagonal: Floats) -> Floats:
        """Squared lengths of the points under a diagonal metric, shape (groups, points)."""
        return np.ascontiguousarray(diagonal.reshape(-1, self.group) @ self.squares.T)

    def round_columns(
        self, parts: Parts, target: Floats, weights: Floats, part: HessianBlock, pool: Workers
    ) -> tuple[Parts, Codes]:
        """Codes of a column block, rounded in order with error feedback, and their scales.

        Shapes: target, weights (n, columns). Each scale is the best for what it is given of those
        near the one in ``parts``.
        """
        scales = np.array(parts.scales, np.float32).reshape(len(target), -1)
        codes, _ = self._feed_back(
            self.lattice.sub, SPREAD, target, weights, part, parts.d, scales, pool
        )
        found = scales.astype(np.int32).reshape(parts.scales.shape)
        return replace(parts, scales=found), codes

    def feed_back(
        self, sub: int, target: Floats, weights: Floats, part: HessianBlock, steps: Floats,
        lows: Floats, pool: Workers,
    ) -> tuple[Codes, Floats]:  # fmt: skip
        """Codes and errors of a block of columns, rounded in order with feedback among them.

        Shapes: target, weights (n, columns); steps (n, runs of ``sub`` columns); the minimums
        ``lows`` are zero.
        """
        ones = np.ones(len(target), np.float32)
        return self._feed_back(sub, 0, target, weights, part, ones, steps.copy(), pool)

    def _feed_back(
        self, sub: int, spread: int, target: Floats, weights: Floats, part: HessianBlock, d: Floats,
        scales: Floats, pool: Workers,
    ) -> tuple[Codes, Floats]:  # fmt: skip
        metric = part.metric(self.width)
        diagonal = metric.reshape(-1, self.width, self.width).diagonal(axis1=1, axis2=2)
        return self.kernels.feedback(
            sub, spread, target, weights, part.factor, metric, self._norms(diagonal), d, scales,
            pool,
        )  # fmt: skip

    def sweep(
        self, parts: Parts, hessian: Floats, gradient: Floats, pool: Workers, *, scales: bool = True
    ) -> Parts:
        """Parts after a sweep over a column block.

        ``gradient`` (n, columns) is the errors times the whole Hessian, ``hessian``
        (columns, columns) the column block's own.
        """
        rows = len(gradient)
        codes = np.array(parts.codes, np.int32).reshape(rows, -1)
        d = np.array(parts.d, np.float32).reshape(rows, -1)
        numbers = np.array(parts.scales, np.float32).reshape(rows, -1)
        norms = self._norms(hessian.diagonal())
        self.kernels.sweep(hessian, norms, gradient, codes, d, numbers, pool, change_scales=scales)
        return Parts(
            d.reshape(-1),
            numbers.reshape(parts.scales.shape).astype(np.int32),
            codes.reshape(parts.codes.shape),
        )
