"""One tensor through a method: rounded with feedback, compared, and the better one taken.

The comparison is with the encoder alone, importance weights and all, on inputs that the fit has not
seen: no method can make a tensor worse there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quantcli.formats.base import Bytes, Floats
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.options import Options, Outcome
from quantcli.rounding.row_feedback import round_by_rows
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.workers import Workers


@dataclass(frozen=True)
class Rounded:
    """Packed rows of one matrix and its two losses, relative to the outputs' squares."""

    packed: Bytes
    before: float
    after: float
    kept: bool


def round_matrix(
    codec: WeightCodec, rows: Floats, statistics: MatrixStatistics, options: Options, pool: Workers
) -> Rounded:
    """Round ``rows`` (n, columns), float32, towards what gives the original outputs."""
    aim = rows
    if statistics.drift is not None:
        aim = statistics.drift.correct(rows, statistics.held_out)
    plain = codec.encode(rows, statistics.importance, pool)
    outputs = statistics.outputs if codec.by_rows else None
    scale = statistics.cost(rows, outputs)

    def loss(packed: Bytes) -> float:
        errors = aim - codec.decode(packed)
        return statistics.cost(errors, outputs) / scale if scale > 0 else 0.0

    before = loss(plain)
    if not options.feedback:
        return Rounded(plain, before, before, kept=False)
    if not codec.has_codes:
        return Rounded(plain, before, before, kept=True)
    hessian, importance = statistics.hessian, statistics.importance
    if outputs is None:
        packed = codec.descend(aim, hessian, importance, options, pool)
    else:
        packed = round_by_rows(codec, aim, hessian, importance, outputs, options, pool)
    after = loss(packed)
    if after <= before:
        return Rounded(packed, before, after, kept=False)
    return Rounded(plain, before, before, kept=True)


def round_tensor(
    name: str, codec: WeightCodec, matrices: int, read: Callable[[int], Floats],
    statistics: Callable[[int], MatrixStatistics | None], options: Options, pool: Workers,
) -> tuple[Bytes, Outcome]:  # fmt: skip
    """All matrices of a tensor; ``read`` gives a matrix's rows, ``statistics`` what is known."""
    parts, before, after, kept = [], 0.0, 0.0, 0
    for matrix in range(matrices):
        rows = read(matrix)
        known = statistics(matrix)
        if known is None:
            parts.append(codec.encode(rows, np.ones(rows.shape[1], np.float32), pool))
            kept += 1
            continue
        found = round_matrix(codec, rows, known, options, pool)
        parts.append(found.packed)
        before += found.before
        after += found.after
        kept += found.kept
    method = "gptq" if options.feedback and codec.has_codes else "importance"
    outcome = Outcome(
        name, codec.name, method, before / matrices, after / matrices, matrices, kept
    )  # fmt: skip
    return np.concatenate(parts), outcome
