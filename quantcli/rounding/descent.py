"""Coordinate descent on codes and scales, after every code was chosen.

Under the full Hessian H the loss ``tr(E H E^T)`` is quadratic in each code, each integer scale or
minimum, and each pair (d, dmin), with all others held. A sweep goes through the blocks from left to
right and sets, in each, every code to the level nearest its optimum (a group's point of a codebook
to a better one, if it is found), then every integer scale and minimum of the sub-blocks, then
(d, dmin) by least squares, rounded to float16. Every step minimises over what it changes or is
taken only where it lowers the loss, so a sweep never raises it, up to the rounding of float32. The
work within a block is done by a native kernel.
"""

from __future__ import annotations

from functools import partial

from quantcli.formats.base import Floats
from quantcli.layerwise.products import SHARE, shares
from quantcli.layerwise.steady import run_tasks
from quantcli.rounding.packed_matrix import PackedMatrix
from quantcli.statistics.hessian import Hessian
from quantcli.workers import Workers


def sweep(matrix: PackedMatrix, hessian: Hessian, *, scales: bool = True) -> None:
    """One sweep over all of ``matrix``; ``scales=False`` leaves all scales as they are."""
    alone = Workers()

    def share(index: int, own: Floats, gradient: Floats, rows: slice) -> None:
        parts = matrix.grid.sweep(
            matrix.parts(index, rows), own, gradient[rows], alone, scales=scales
        )
        matrix.set_parts(index, parts, rows)

    for index, columns in enumerate(matrix.columns):
        own, gradient = hessian.own(columns), hessian.slope(matrix.errors, columns)
        run_tasks(
            [partial(share, index, own, gradient, rows) for rows in shares(matrix.count, SHARE)]
        )
