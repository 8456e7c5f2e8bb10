"""A calibration for people and for scripts: what was covered, and what stands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantcli.report.tables import Column, Table
from quantcli.statistics.importance_file import Calibration
from quantcli.statistics.token_counts import TensorStats, TokenCounts, count_tokens, tensor_stats

_COVERAGE = (
    Column("Tensor"), Column("Experts", "right"), Column("Unseen", "right"),
    Column("Tokens: least", "right"), Column("median", "right"), Column("most", "right"),
    Column("Weights from"),
)  # fmt: skip
_STATS = (
    Column("Tensor"), Column("Sum", "right"), Column("Active", "right"),
    Column("Entropy", "right"), Column("of most", "right"), Column("Outliers", "right"),
    Column("Largest", "right"), Column("Cosine", "right"),
)  # fmt: skip


def coverage_table(calibration: Calibration) -> Table:
    """Tokens seen by each stack of experts; plain tensors of one kind see the same and are one row.

    What saw too little stands in the last column.
    """
    lines = count_tokens(calibration)
    rows = [_coverage_row(line) for line in lines if line.matrices > 1]
    plain = [line for line in lines if line.matrices == 1]
    for tokens in sorted({line.least for line in plain}):
        alike = [line for line in plain if line.least == tokens]
        name = alike[0].tensor if len(alike) == 1 else f"{len(alike)} tensors"
        rows.append((name, "", "", str(tokens), str(tokens), str(tokens), alike[0].policy))
    return Table(_COVERAGE, tuple(rows), title="Coverage")


def stats_table(calibration: Calibration) -> Table:
    """Figures of each tensor's mean squares."""
    return Table(
        _STATS,
        tuple(_stats_row(line) for line in tensor_stats(calibration)),
        title="Mean squares of the inputs",
        note="Entropy in bits and as a share of the largest possible; outliers are channels of "
        "six times the usual size; cosine with the same tensor of the layer before.",
    )


def calibration_document(
    calibration: Calibration, paths: Sequence[str], *, stats: bool
) -> dict[str, Any]:
    """The fields of the JSON object."""
    body: dict[str, Any] = {
        "paths": list(paths),
        "datasets": list(calibration.datasets),
        "chunks": calibration.chunks,
        "chunk_size": calibration.chunk_size,
        "coverage": [asdict(line) | {"policy": line.policy} for line in count_tokens(calibration)],
    }
    if stats:
        body["stats"] = [asdict(line) for line in tensor_stats(calibration)]
    return body


def _coverage_row(line: TokenCounts) -> tuple[str, ...]:
    numbers = (line.matrices, line.unseen, line.least, line.median, line.most)
    return (line.tensor, *map(str, numbers), line.policy)


def _stats_row(line: TensorStats) -> tuple[str, ...]:
    return (
        line.tensor,
        f"{line.total:.4g}",
        f"{100 * line.active:.1f} %",
        f"{line.entropy:.2f}",
        f"{100 * line.entropy_share:.1f} %",
        str(line.outliers),
        str(line.channel),
        "" if line.cosine is None else f"{line.cosine:.4f}",
    )
