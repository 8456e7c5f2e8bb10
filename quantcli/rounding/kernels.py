"""The kernels that choose codes, described once for a format and run on rows in parallel.

Nothing else in this room calls the native module, so another back end (a GPU's) is chosen here.
Rows are independent: each thread takes a share of them. qk.h describes what the kernels compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantcli import _native
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.search import Codes
from quantcli.workers import Workers


@dataclass(frozen=True, eq=False)
class ScalarKernels:
    """Weights that are coded one by one: ``levels`` in rising order, and how scales are stored.

    ``uniform`` levels are one apart. ``sub`` columns share a step and a minimum, ``block`` columns
    a d and a dmin (None: all columns), which are float16 if ``half``.
    """

    levels: Floats
    uniform: bool
    sub: int
    block: int | None = None
    half: bool = False
    scale_range: tuple[int, int] = (1, 1)
    min_range: tuple[int, int] = (1, 1)

    def feedback(
        self, run: int, target: Floats, weights: Floats, factor: Floats, steps: Floats,
        lows: Floats, pool: Workers,
    ) -> tuple[Bytes, Floats]:  # fmt: skip
        """Codes (places in ``levels``) and errors (n, columns), rounded in order with feedback.

        Shapes: target, weights (n, columns); factor (columns, columns); steps, lows (n, runs of
        ``run`` columns).
        """
        codes, errors = np.empty(target.shape, np.uint8), np.empty(target.shape, np.float32)
        target, weights, factor, steps, lows = map(
            np.ascontiguousarray, (target, weights, factor, steps, lows)
        )

        def share(start: int, stop: int) -> None:
            part = slice(start, stop)
            _native.feedback(
                self.levels, self.uniform, run, target[part], weights[part], factor,
                steps[part], lows[part], codes[part], errors[part],
            )  # fmt: skip

        pool.run(len(target), share)
        return codes, errors

    def sweep(
        self, hessian: Floats, gradient: Floats, codes: Bytes, d: Floats, scales: Floats,
        dmin: Floats | None, mins: Floats | None, pool: Workers, *, change_scales: bool,
    ) -> None:  # fmt: skip
        """Descend on ``codes`` and, with ``change_scales``, on the four arrays of scales, in place.

        Shapes: hessian (columns, columns); gradient, codes (n, columns); d, dmin (n, blocks);
        scales, mins (n, runs).
        """
        columns = len(hessian)
        sums = hessian.reshape(columns // self.sub, self.sub, -1).sum(axis=1)

        def share(start: int, stop: int) -> None:
            part = slice(start, stop)
            _native.sweep(
                self.levels, self.uniform, self.sub, self.block or columns, self.half,
                self.scale_range, self.min_range, hessian, sums, gradient[part], change_scales,
                codes[part], d[part], scales[part],
                None if dmin is None else dmin[part], None if mins is None else mins[part],
            )  # fmt: skip

        pool.run(len(gradient), share)


@dataclass(frozen=True, eq=False)
class VectorKernels:
    """Groups of weights that are points of a codebook: the patterns of half groups.

    ``patterns`` (points, 2) has the first and the second half of each point. With ``apart`` the
    second half of the points is the first one, each level moved by that, and a run takes its points
    from one half alone. ``sub`` and ``block`` are as in `ScalarKernels`.
    """

    first: Floats
    second: Floats
    patterns: Bytes
    signs: str
    apart: float
    group: int
    sub: int
    block: int
    scale_range: tuple[int, int]

    def feedback(
        self, run: int, spread: int, target: Floats, weights: Floats, factor: Floats,
        metric: Floats, norms: Floats, d: Floats, scales: Floats, pool: Workers,
    ) -> tuple[Codes, Floats]:  # fmt: skip
        """Codes (n, groups) and errors (n, columns), rounded in order with feedback.

        Shapes: target, weights (n, columns); factor (columns, columns); metric (columns, width of
        a unit); norms (groups, points); d (n,); scales (n, runs of ``run`` columns), which are
        changed to the best of those up to ``spread`` odd numbers away.
        """
        codes = np.empty((len(target), target.shape[1] // self.group), np.int32)
        errors = np.empty(target.shape, np.float32)
        target, weights, factor = map(np.ascontiguousarray, (target, weights, factor))

        def share(start: int, stop: int) -> None:
            part = slice(start, stop)
            _native.feedback_points(
                self.first, self.second, self.patterns, self.signs, self.apart, run, spread,
                self.scale_range[1], target[part], weights[part], factor, metric, norms,
                d[part], scales[part], codes[part], errors[part],
            )  # fmt: skip

        pool.run(len(target), share)
        return codes, errors

    def sweep(
        self, hessian: Floats, norms: Floats, gradient: Floats, codes: Codes, d: Floats,
        scales: Floats, pool: Workers, *, change_scales: bool,
    ) -> None:  # fmt: skip
        """Descend on ``codes`` and, with ``change_scales``, on ``d`` and ``scales``, in place.

        Shapes: hessian (columns, columns); norms (groups, points); gradient (n, columns); codes
        (n, groups); d (n, blocks); scales (n, runs).
        """

        def share(start: int, stop: int) -> None:
            part = slice(start, stop)
            _native.sweep_points(
                self.first, self.second, self.patterns, self.signs, self.apart, self.sub,
                self.block, self.scale_range, hessian, norms, gradient[part], change_scales,
                codes[part], d[part], scales[part],
            )  # fmt: skip

        pool.run(len(gradient), share)
