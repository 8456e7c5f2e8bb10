"""An importance matrix for people: what it was collected on, and what it says nothing about.

An expert that no token reached has no counts; the encoders then weigh all its columns alike, as
if there were no matrix. Columns whose mean square is zero were never excited by the data: their
weights are rounded with no care at all. Both tell that the text was too short or too uniform.
The legacy form does not record counts, so there only zero columns show.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.report.tables import Column, Table, facts
from quantcli.report.units import number_text, percent_text, size_text
from quantcli.sources.gguf import is_gguf, open_gguf
from quantcli.sources.imatrix import CHUNK_SIZE, COUNTS, Importance, read_importance
from quantcli.types import row_count


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor's importance: matrices of columns, and how much of it is known.

    ``unseen`` counts matrices (experts) without any input, None where the form does not tell.
    """

    name: str
    matrices: int
    columns: int
    unseen: int | None
    zero_columns: int
    low: float
    high: float
    mean: float

    @property
    def values(self) -> int:
        """Mean squares in the entry."""
        return self.matrices * self.columns


@dataclass(frozen=True, slots=True)
class Coverage:
    """An importance matrix as a whole."""

    path: Path
    form: str
    entries: tuple[Entry, ...]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int | None

    @property
    def unseen(self) -> int | None:
        """Matrices without any input, over all entries; None where the form does not tell."""
        counts = [entry.unseen for entry in self.entries]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def zero_share(self) -> float:
        """Share of columns, over all entries, that the data never excited."""
        total = sum(entry.values for entry in self.entries)
        return sum(entry.zero_columns for entry in self.entries) / max(1, total)


def read_coverage(path: Path) -> Coverage:
    """Read an importance matrix of either form; SourceError when it is broken."""
    importance = read_importance(path)
    unseen: dict[str, int] = {}
    chunk_size = None
    in_gguf = is_gguf(path)
    if in_gguf:
        store = open_gguf(path)
        try:
            chunk_size = int(store.metadata[CHUNK_SIZE].value)
            for name in importance.entries:
                info = store.tensors[name + COUNTS]
                counts = store.read_rows(info.name, 0, row_count(info.shape))
                unseen[name] = int(np.count_nonzero(counts < 0.5))
        finally:
            store.close()
    return Coverage(
        path,
        "GGUF" if in_gguf else "legacy .dat",
        tuple(_entry(importance, name, unseen.get(name)) for name in importance.entries),
        importance.datasets,
        importance.chunks,
        chunk_size,
    )


def _entry(importance: Importance, name: str, unseen: int | None) -> Entry:
    values = importance.entries[name]
    matrices, columns = values.shape
    return Entry(
        name,
        matrices,
        columns,
        unseen,
        int(np.count_nonzero(values == 0)),
        float(values.min()),
        float(values.max()),
        float(values.mean(dtype=np.float64)),
    )


def coverage_tables(coverage: Coverage, entries: tuple[Entry, ...] | None = None) -> list[Table]:
    """Facts about the matrix, then one line for each of ``entries`` (default: all)."""
    tokens = ""
    if coverage.chunk_size:
        tokens = f" of {coverage.chunk_size:,} tokens"
    unseen = coverage.unseen
    rows = [
        ("Importance matrix", f"{coverage.form} form, {size_text(coverage.path.stat().st_size)}"),
        ("Entries", f"{len(coverage.entries):,}"),
        ("Collected on", f"{coverage.chunks:,} chunks{tokens}" if coverage.chunks else "not told"),
        ("Data sets", ", ".join(coverage.datasets) or "not told"),
        ("Unseen matrices", "not recorded in this form" if unseen is None else f"{unseen:,}"),
        ("Columns at zero", percent_text(coverage.zero_share)),
    ]
    shown = coverage.entries if entries is None else entries
    return [facts(rows), _entry_table(shown)]


def _entry_table(entries: tuple[Entry, ...]) -> Table:
    rows = tuple(
        (
            entry.name,
            f"{entry.matrices} x {entry.columns}" if entry.matrices > 1 else str(entry.columns),
            "?" if entry.unseen is None else str(entry.unseen),
            str(entry.zero_columns),
            number_text(entry.low),
            number_text(entry.high),
            number_text(entry.mean),
        )
        for entry in entries
    )
    columns = (
        Column("Entry"),
        *(
            Column(name, "right")
            for name in ("Columns", "Unseen", "Zero", "Smallest", "Largest", "Mean")
        ),
    )
    return Table(columns, rows, title="Mean squares of the inputs")


def coverage_document(coverage: Coverage, entries: tuple[Entry, ...]) -> dict[str, Any]:
    """The same with exact numbers, for ``--json``."""
    return {
        "kind": "imatrix",
        "path": str(coverage.path),
        "form": "gguf" if coverage.form == "GGUF" else "legacy",
        "datasets": list(coverage.datasets),
        "chunks": coverage.chunks,
        "chunk_size": coverage.chunk_size,
        "unseen_matrices": coverage.unseen,
        "zero_column_share": coverage.zero_share,
        "entries": [
            {
                "name": entry.name,
                "matrices": entry.matrices,
                "columns": entry.columns,
                "unseen_matrices": entry.unseen,
                "zero_columns": entry.zero_columns,
                "min": entry.low,
                "max": entry.high,
                "mean": entry.mean,
            }
            for entry in entries
        ],
    }
