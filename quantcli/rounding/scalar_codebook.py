"""Weights that are coded one by one, before the kernels that choose their codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantcli.formats.base import Bytes, Floats
from quantcli.formats.lattice import Lattice, Parts
from quantcli.formats.search import Codes
from quantcli.rounding.kernels import ScalarKernels
from quantcli.statistics.hessian import HessianBlock
from quantcli.workers import Workers


@dataclass(frozen=True)
class ScalarCodebook:
    """A scalar lattice, and its kernels, which have the levels in rising order."""

    lattice: Lattice
    kernels: ScalarKernels
    order: Codes
    """The lattice's own code of each level in rising order."""
    ranks: Bytes
    """The place of each of the lattice's own codes in that order."""
    group = width = together = 1

    @classmethod
    def of(cls, lattice: Lattice) -> ScalarCodebook:
        """Those of ``lattice``; of equal levels the first code is taken."""
        levels, first = np.unique(lattice.levels, return_index=True)
        uniform = bool((np.diff(levels) == 1).all())
        ranks = np.searchsorted(levels, lattice.levels).astype(np.uint8)
        kernels = ScalarKernels(
            levels.astype(np.float32), uniform, lattice.sub, lattice.block, lattice.half,
            lattice.scale_range, lattice.min_range or (0, 0),
        )  # fmt: skip
        return cls(lattice, kernels, first.astype(np.int32), ranks)

    @property
    def levels(self) -> Floats:
        """In rising order."""
        return self.kernels.levels

    def round_columns(
        self, parts: Parts, target: Floats, weights: Floats, part: HessianBlock, pool: Workers
    ) -> tuple[Parts, Codes]:
        """Codes of a column block, rounded in order with error feedback, and their scales.

        Shapes: target, weights (n, columns). The scales are those of ``parts``.
        """
        steps, lows = (runs.reshape(len(target), -1) for runs in self.lattice.steps(parts))
        codes, _ = self.feed_back(self.lattice.sub, target, weights, part, steps, lows, pool)
        return parts, codes

    def feed_back(
        self, sub: int, target: Floats, weights: Floats, part: HessianBlock, steps: Floats,
        lows: Floats, pool: Workers,
    ) -> tuple[Codes, Floats]:  # fmt: skip
        """Codes and errors of a block of columns, rounded in order with feedback among them.

        Shapes: target, weights (n, columns); steps, lows (n, runs of ``sub`` columns).
        """
        codes, errors = self.kernels.feedback(sub, target, weights, part.factor, steps, lows, pool)
        return self.order[codes], errors

    def sweep(
        self, parts: Parts, hessian: Floats, gradient: Floats, pool: Workers, *, scales: bool = True
    ) -> Parts:
        """Parts after a sweep over a column block.

        ``gradient`` (n, columns) is the errors times the whole Hessian, ``hessian``
        (columns, columns) the column block's own.
        """
        rows = len(gradient)
        codes = self.ranks[parts.codes].reshape(rows, -1)

        def shaped(values: Floats | Codes) -> Floats:
            return np.ascontiguousarray(values.reshape(rows, -1), np.float32)

        d, numbers = shaped(parts.d.copy()), shaped(parts.scales)
        low = None if parts.dmin is None else shaped(parts.dmin.copy())
        lows = None if parts.mins is None else shaped(parts.mins)
        self.kernels.sweep(
            hessian, gradient, codes, d, numbers, low, lows, pool, change_scales=scales
        )
        return Parts(
            d.reshape(-1),
            numbers.reshape(parts.scales.shape).astype(np.int32),
            self.order[codes].reshape(parts.codes.shape),
            None if low is None else low.reshape(-1),
            None if lows is None or parts.mins is None
            else lows.reshape(parts.mins.shape).astype(np.int32),
        )  # fmt: skip
