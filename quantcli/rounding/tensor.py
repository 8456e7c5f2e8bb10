"""One tensor through a rounder: rounded, compared with rounding to nearest, the better one taken.

The comparison is on inputs that the fit has not seen: no rounder can make a tensor worse there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantcli.errors import UsageError
from quantcli.formats.base import Bytes, Floats
from quantcli.rounding.base import Rounder
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.nearest import NEAREST
from quantcli.rounding.options import Options, Outcome
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
    rounder: Rounder, codec: WeightCodec, rows: Floats, statistics: MatrixStatistics,
    options: Options, pool: Workers,
) -> Rounded:  # fmt: skip
    """Round ``rows`` (n, columns), float32, towards what gives the original outputs.

    UsageError for a rounder that does not return packed rows.
    """
    aim = rows
    if statistics.drift is not None:
        aim = statistics.drift.correct(rows, statistics.held_out)
    plain = NEAREST.round(codec, rows, statistics, options, pool)
    if not codec.by_rows:
        statistics = replace(statistics, outputs=None)
    outputs = statistics.outputs
    scale = statistics.cost(rows, outputs)

    def loss(packed: Bytes) -> float:
        errors = codec.decode(packed)
        np.subtract(aim, errors, out=errors)
        return statistics.cost(errors, outputs) / scale if scale > 0 else 0.0

    before = loss(plain)
    if rounder is NEAREST:
        return Rounded(plain, before, before, kept=False)
    if not rounder.fits(codec):
        return Rounded(plain, before, before, kept=True)
    packed = rounder.round(codec, aim, statistics, options, pool)
    _refuse_unpacked(rounder, codec, packed, plain)
    after = loss(packed)
    if after <= before:
        return Rounded(packed, before, after, kept=False)
    return Rounded(plain, before, before, kept=True)


def _refuse_unpacked(rounder: Rounder, codec: WeightCodec, packed: Any, plain: Bytes) -> None:
    given = f"{getattr(packed, 'dtype', type(packed).__name__)} {getattr(packed, 'shape', '')}"
    wanted = f"{plain.dtype} {plain.shape}"
    if given != wanted:
        raise UsageError(
            f"the rounder {rounder.name!r} returned {given}, and packed rows of {codec.name} are "
            f"{wanted}"
        )


def round_tensor(
    name: str, rounder: Rounder, codecs: Sequence[WeightCodec], matrices: int,
    read: Callable[[int], Floats], statistics: Callable[[int], MatrixStatistics | None],
    options: Options, pool: Workers,
) -> list[tuple[Bytes, Outcome]]:  # fmt: skip
    """Round every matrix of a tensor (one, or one per expert) in each of ``codecs``.

    ``read`` gives a matrix's rows, ``statistics`` None where the text never reached it; both are
    asked once for all codecs.
    """
    parts: list[list[Rounded]] = [[] for _ in codecs]
    for matrix in range(matrices):
        rows = read(matrix)
        measured = statistics(matrix)
        for codec, own in zip(codecs, parts, strict=True):
            if measured is None:
                packed = codec.encode(rows, np.ones(rows.shape[1], np.float32), pool)
                own.append(Rounded(packed, 0.0, 0.0, kept=True))
            else:
                own.append(round_matrix(rounder, codec, rows, measured, options, pool))
    return [
        (
            np.concatenate([part.packed for part in own]),
            Outcome(
                name,
                codec.name,
                "importance" if rounder is NEAREST or not rounder.fits(codec) else rounder.name,
                sum(part.before for part in own) / matrices,
                sum(part.after for part in own) / matrices,
                matrices,
                sum(part.kept for part in own),
            ),
        )
        for codec, own in zip(codecs, parts, strict=True)
    ]
