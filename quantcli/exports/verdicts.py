"""The verdict of a verification, for people and for programs."""

from __future__ import annotations

from typing import Any

from quantcli.exports.verify import TensorError, VerificationDone
from quantcli.report.tables import Column, Table, facts
from quantcli.report.units import number_text, percent_text, shape_text, size_text


def verdict_tables(artifact: str, against: str | None, found: VerificationDone) -> list[Table]:
    """Each tensor's error where there is a source, and the findings."""
    tables = []
    if against is not None:
        columns = (
            Column("tensor"),
            Column("shape"),
            Column("type"),
            Column("size", "right"),
            Column("relative error", "right"),
            Column("largest error", "right"),
        )
        rows = tuple(
            (
                line.name,
                shape_text(line.shape),
                line.dtype,
                size_text(line.nbytes),
                *_cells(line.error),
            )
            for line in found.lines
        )
        tables.append(Table(columns, rows))
    nbytes = sum(line.nbytes for line in found.lines)
    lines = [("artifact", artifact), ("tensors", f"{len(found.lines)}, {size_text(nbytes)}")]
    if found.overall is not None:
        relative, largest = _cells(found.overall)
        lines.append(("error", f"{relative} (root mean square, all tensors), largest {largest}"))
    if found.made_from is not None:
        lines += [("source", f"{against}"), ("made from it", "yes" if found.made_from else "no")]
    lines += [("problem", problem) for problem in found.problems]
    count = len(found.problems)
    lines.append(("verdict", f"{count} problem{'s' * (count > 1)}" if count else "sound"))
    return [*tables, facts(lines)]


def verdict_document(artifact: str, against: str | None, found: VerificationDone) -> dict[str, Any]:
    """The same with exact numbers, for ``--json``."""
    return {
        "artifact": artifact,
        "against": against,
        "sound": not found.problems,
        "problems": list(found.problems),
        "made_from_source": found.made_from,
        "error": _error(found.overall),
        "tensors": [
            {
                "name": line.name,
                "shape": list(line.shape),
                "type": line.dtype,
                "bytes": line.nbytes,
                "error": _error(line.error),
            }
            for line in found.lines
        ],
    }


def _cells(error: TensorError | None) -> tuple[str, str]:
    if error is None:
        return "", ""
    relative = "" if error.relative is None else percent_text(error.relative)
    return relative, number_text(error.largest)


def _error(error: TensorError | None) -> dict[str, float | None] | None:
    return None if error is None else {"relative_rms": error.relative, "largest": error.largest}
