"""Error feedback across rows: each group of rows compensates the errors of those before it.

With F = (I + U) D (I + U)^T the Fisher information at the outputs, rows in the order of their
weight in it, ``tr(F E H E^T)`` is least when a row is rounded from its own weights plus the errors
of the rows before it, times their column of U: the same feedback that goes from column to column
within a row. A group of rows is rounded at once, and goes through a last sweep of descent when
all are rounded, then from what all the others lost. See `quantcli.statistics.output_fisher`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from quantcli.formats.base import Bytes, Floats
from quantcli.layerwise.products import product
from quantcli.rounding.codecs import BlockCodec, WeightCodec
from quantcli.rounding.options import Options
from quantcli.rounding.tied_rows import RowTies, round_tied
from quantcli.statistics.hessian import ColumnOrder, Hessian
from quantcli.statistics.output_fisher import OutputFisher, cut_strips
from quantcli.workers import Workers

_SHARE = 32
"""A group is this part of its strip. Smaller ones round a little better, and slower."""
_LEAST = 8


def round_by_rows(
    codec: WeightCodec, rows: Floats, hessian: Hessian, importance: Floats, outputs: OutputFisher,
    options: Options, pool: Workers,
) -> Bytes:  # fmt: skip
    """Packed rows of ``rows`` (n, columns), float32, rounded under both Hessians."""
    packed: Bytes | None = None
    for number, strip in enumerate(cut_strips(len(rows))):
        fisher = outputs.prepare(number)
        order = fisher.order
        if order is None:
            raise ValueError("the outputs' Hessian has no order")
        if isinstance(codec, BlockCodec) and hessian.order is None:
            share = partial(find_share, fisher.matrix, order)
            ties = RowTies.of(fisher.factor, cut_groups(len(order)), share)
            # Its factor is not needed any more.
            del fisher
            found = round_tied(
                codec.format, codec.unscaled(rows), strip.start + order, hessian, importance,
                ties, options,
            )  # fmt: skip
            del ties, share
        else:
            found = _round_strip(
                codec, np.ascontiguousarray(rows[strip][order]), hessian, importance,
                fisher, order, options, pool,
            )  # fmt: skip
        if packed is None:
            packed = np.empty((len(rows), found.shape[1]), np.uint8)
        packed[strip.start + order] = found
    if packed is None:
        raise ValueError("no rows")
    return packed


def cut_groups(rows: int) -> list[slice]:
    """The groups of a strip's rows, in the order in which they are rounded."""
    size = max(_LEAST, rows // _SHARE // _LEAST * _LEAST)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def find_share(matrix: Floats, order: ColumnOrder, group: slice) -> Floats:
    """What the errors of all rows ask of a group's, its own included: (group, rows)."""
    tied = matrix[np.ix_(order[group], order)]
    inverse = np.linalg.inv(tied[:, group].astype(np.float64)).astype(np.float32)
    return product(inverse, tied)


def _round_strip(
    codec: WeightCodec, rows: Floats, hessian: Hessian, importance: Floats, fisher: Hessian,
    order: ColumnOrder, options: Options, pool: Workers,
) -> Bytes:  # fmt: skip
    """Packed rows of a strip, in the order of ``fisher``."""
    groups = cut_groups(len(rows))
    errors = np.zeros_like(rows)
    parts: list[Bytes] = []
    first = replace(options, sweeps=max(0, options.sweeps - 1))
    for group in groups:
        before = slice(0, group.start)
        carried = product(fisher.factor[before, group].T, errors[before])
        aim = np.ascontiguousarray(rows[group] + carried)
        packed = codec.descend(aim, hessian, importance, first, pool)
        errors[group] = rows[group] - codec.decode(packed)
        parts.append(packed)
    if options.sweeps == 0:
        return np.concatenate(parts)
    for number, group in enumerate(groups):
        share = find_share(fisher.matrix, order, group)
        aim = np.asarray(rows[group] + (product(share, errors) - errors[group]), np.float32)
        parts[number] = codec.refine(parts[number], aim, hessian, pool)
        errors[group] = rows[group] - codec.decode(parts[number])
    return np.concatenate(parts)
