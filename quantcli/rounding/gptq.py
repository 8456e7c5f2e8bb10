"""GPTQ on a block format's own grid: round column by column and let later columns make it good.

At the start of each 256 columns the scales are those that the format's encoder finds, importance
and all, in the weights as the feedback so far has changed them; under these the columns are rounded
in order, each error passed on to the columns after it; a group that is one point of a codebook is
rounded at once. Then the 256 columns are swept: every code and scale goes to its best given the
others, in the measure of what the later columns cannot make good. A Hessian in another order
(largest mean square first, when most columns are left to make up for the error) has the scales
taken from the untouched weights, and no such sweeps.

Sources: GPTQ (arXiv:2210.17323); QuIP (arXiv:2307.13304) for the form of the feedback; the choice
of both scale levels from compensated weights follows the GPTQ of DASLab's gptq-gguf-toolkit.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats import native
from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.lattice import Parts
from quantcli.rounding.packed_matrix import Coded
from quantcli.statistics.hessian import Hessian, Order
from quantcli.workers import Workers

_CHUNK = 256
"""Columns that are rounded at once where they are taken out of order."""


def round_with_feedback(
    fmt: BlockFormat, rows: Floats, hessian: Hessian, importance: Floats | None, crew: Workers,
    settle: int = 0,
) -> Coded:  # fmt: skip
    """Round ``rows`` (n, columns), float32, in the order of ``hessian``.

    ``importance`` has a weight for each column, for the encoder's search for scales; ``settle``
    sweeps go over each 256 columns, and with none this is GPTQ as it was published.
    """
    coded = Coded(fmt, rows)
    ordered = hessian.keep_together(coded.grid.width)
    if ordered.order is None:
        _round_in_order(coded, ordered, importance, crew, settle)
    else:
        _round_sorted(coded, ordered, ordered.order, importance, crew)
    return coded


def encode_columns(
    fmt: BlockFormat, target: Floats, importance: Floats | None, crew: Workers
) -> Bytes:
    """The encoder's own packed blocks of ``target`` (n, columns)."""
    packed = np.empty((len(target), fmt.row_bytes(target.shape[1])), np.uint8)

    def share(start: int, stop: int) -> None:
        native.encode(fmt, target[start:stop], importance, out=packed[start:stop])

    crew.run(len(target), share)
    return packed


def _find_parts(
    coded: Coded, target: Floats, columns: slice, importance: Floats | None, crew: Workers
) -> Parts:
    important = None if importance is None else importance[columns]
    return coded.split(encode_columns(coded.format, target, important, crew))


def _round_in_order(
    coded: Coded, hessian: Hessian, importance: Floats | None, crew: Workers, settle: int
) -> None:
    factor = hessian.factor
    for index, columns in enumerate(coded.columns):
        first = columns.start
        weights = np.ascontiguousarray(coded.rows[:, columns])
        target = weights + coded.errors[:, :first] @ factor[:first, columns]
        parts = _find_parts(coded, target, columns, importance, crew)
        part = hessian.part(columns)
        parts, codes = coded.grid.round_panel(parts, target, weights, part, crew)
        coded.set_codes(index, parts, codes)
        if settle == 0:
            continue
        metric, pull = part.metric(columns.stop - first), target - weights
        for _ in range(settle):
            missed = pull + coded.errors[:, columns] @ part.factor
            gradient = (missed * part.pivots) @ part.factor.T
            coded.set_parts(index, coded.grid.sweep(coded.parts(index), metric, gradient, crew))


def _round_sorted(
    coded: Coded, hessian: Hessian, order: Order, importance: Floats | None, crew: Workers
) -> None:
    rows, sub, grid = coded.rows, coded.lattice.sub, coded.grid
    found = [
        _find_parts(coded, np.ascontiguousarray(rows[:, columns]), columns, importance, crew)
        for columns in coded.columns
    ]
    both = [coded.steps(parts) for parts in found]
    steps, lows = (np.concatenate(part, axis=1) for part in zip(*both, strict=True))
    codes = np.empty((len(rows), rows.shape[1] // grid.group), np.int32)
    errors = np.zeros_like(rows)
    for start in range(0, rows.shape[1], _CHUNK):
        chunk = slice(start, min(start + _CHUNK, rows.shape[1]))
        chosen = order[chunk]
        weights = rows[:, chosen]
        target = weights + errors[:, :start] @ hessian.factor[:start, chunk]
        runs = chosen[:: grid.width] // sub
        codes[:, chosen[:: grid.group] // grid.group], errors[:, chunk] = grid.feed_back(
            grid.width, target, weights, hessian.part(chunk), steps[:, runs], lows[:, runs], crew
        )
    for index, columns in enumerate(coded.columns):
        groups = slice(columns.start // grid.group, columns.stop // grid.group)
        coded.set_codes(index, found[index], codes[:, groups])
