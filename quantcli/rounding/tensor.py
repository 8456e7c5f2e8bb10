"""One tensor through a rounder: rounded, compared with rounding to nearest, the better one taken.

The comparison is on inputs that the fit has not seen: no rounder can make a tensor worse there.
Losses of wide matrices are estimates (`quantcli.statistics.sketched_loss`); where these leave open
which result is the better one, both losses are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantcli.errors import UsageError
from quantcli.formats.base import Bytes, Floats
from quantcli.rounding.base import Rounder
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.nearest import NEAREST
from quantcli.rounding.options import Options, Outcome
from quantcli.statistics.losses import ErrorReader
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.workers import Workers

PartReader = Callable[[int], Iterable[Floats]]
"""The rows of a matrix, some at a time."""


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
    found = _round_rows(rounder, codec, rows, aim, statistics, options, pool)
    return _judge([found], rounder)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a matrix: both results and their costs, and what the rows themselves cost."""

    plain: Bytes
    packed: Bytes
    before: float
    after: float
    whole: float
    chosen: bool


def _round_rows(
    rounder: Rounder, codec: WeightCodec, rows: Floats, aim: Floats, statistics: MatrixStatistics,
    options: Options, pool: Workers,
) -> _Rows:  # fmt: skip
    plain = NEAREST.round(codec, rows, statistics, options, pool)
    if not codec.by_rows:
        statistics = replace(statistics, outputs=None)
    judge = statistics.judge(len(rows), statistics.outputs)

    def lost(packed: Bytes) -> ErrorReader:
        def read(part: slice) -> Floats:
            if not codec.by_rows:
                return np.asarray(aim - codec.decode(packed))[part]
            errors = codec.decode(packed[part])
            return np.subtract(aim[part], errors, out=errors)

        return read

    reads: list[ErrorReader] = [lambda part: rows[part], lost(plain)]
    taken = [judge.take(read) for read in reads]
    packed = plain
    chosen = rounder is not NEAREST and rounder.fits(codec)
    if chosen:
        packed = rounder.round(codec, aim, statistics, options, pool)
        _refuse_unpacked(rounder, codec, packed, plain)
        reads.append(lost(packed))
        taken.append(judge.take(reads[-1]))
    whole, *losses = judge.settle(taken)
    apart = not chosen or losses[0].is_apart(losses[1])
    known = apart and all(loss.is_close for loss in losses)
    before, *after = (
        loss.value if known else judge.cost(read)
        for loss, read in zip(losses, reads[1:], strict=True)
    )
    size = whole.value if whole.is_close else judge.cost(reads[0])
    return _Rows(plain, packed, before, after[0] if chosen else before, size, chosen)


def _judge(found: Sequence[_Rows], rounder: Rounder) -> Rounded:
    """The better one of a matrix's two results, whose rows are all of ``found``."""
    before, after, whole = (
        sum(costs) for costs in zip(*((f.before, f.after, f.whole) for f in found), strict=True)
    )
    before, after = (cost / whole if whole > 0 else 0.0 for cost in (before, after))
    if found[0].chosen and after <= before:
        return Rounded(_join([part.packed for part in found]), before, after, kept=False)
    kept = rounder is not NEAREST
    return Rounded(_join([part.plain for part in found]), before, before, kept=kept)


def _join(parts: Sequence[Bytes]) -> Bytes:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _may_be_parted(rounder: Rounder, codec: WeightCodec, statistics: MatrixStatistics) -> bool:
    """Whether rows know nothing of one another."""
    alone = statistics.outputs is None and statistics.drift is None
    return codec.by_rows and alone and getattr(rounder, "by_rows", False)


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
    options: Options, pool: Workers, parts_of: PartReader | None = None,
) -> list[tuple[Bytes, Outcome]]:  # fmt: skip
    """Round every matrix of a tensor (one, or one per expert) in each of ``codecs``.

    ``read`` gives a matrix's rows, ``statistics`` None where the text never reached it; both are
    asked once for all codecs. With ``parts_of`` rows that know nothing of one another, as those of
    an embedding, are read and rounded some at a time: a matrix then takes no more than its two
    results and 16 bytes for each weight of a part.
    """
    parts: list[list[Rounded]] = [[] for _ in codecs]
    for matrix in range(matrices):
        measured = statistics(matrix)
        if (
            parts_of is not None
            and measured is not None
            and all(_may_be_parted(rounder, codec, measured) for codec in codecs)
        ):
            found: list[list[_Rows]] = [[] for _ in codecs]
            for rows in parts_of(matrix):
                for codec, own_rows in zip(codecs, found, strict=True):
                    own_rows.append(
                        _round_rows(rounder, codec, rows, rows, measured, options, pool)
                    )
            for own, own_rows in zip(parts, found, strict=True):
                own.append(_judge(own_rows, rounder))
            continue
        rows = read(matrix)
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
