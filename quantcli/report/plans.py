"""A plan for people and for programs: what each tensor becomes and why, and what it will cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

from quantcli.artifacts.gguf_file import GgufFile
from quantcli.plan.budget import free_disk
from quantcli.plan.needs import Forecast
from quantcli.report.needs import needs_facts, needs_fields
from quantcli.report.tables import Column, Table, facts
from quantcli.report.units import shape_text, size_text


def plan_tables(job: GgufFile, threads: int, forecast: Forecast | None = None) -> list[Table]:
    """The tensor table in the order of the file, and the totals."""
    rows = tuple(
        (
            item.tensor.name,
            shape_text(item.tensor.shape),
            item.tensor.dtype,
            item.format,
            size_text(item.nbytes),
            item.reason.removesuffix(f": {item.format}"),
        )
        for item in job.plan.items
    )
    columns = (
        Column("tensor"),
        Column("shape"),
        Column("from"),
        Column("to"),
        Column("size", "right"),
        Column("why"),
    )
    counts = Counter(item.format for item in job.plan.items)
    first = job.paths[0]
    files = str(first) if len(job.paths) == 1 else f"{len(job.paths)} files, {first.name} ..."
    totals = [
        ("output", files),
        ("size", f"{size_text(job.nbytes)} ({job.nbytes:,} bytes)"),
        ("bits per weight", f"{job.plan.bits_per_weight:.2f}"),
        ("types", ", ".join(f"{count} x {name}" for name, count in counts.most_common())),
        *needs_facts(forecast, free_disk(first.parent)),
    ]
    return [Table(columns, rows), facts(totals)]


def plan_document(job: GgufFile, threads: int, forecast: Forecast | None = None) -> dict[str, Any]:
    """The same with exact numbers, for ``--json``."""
    return {
        "type": job.plan.recipe.type,
        "file_type": job.plan.file_type,
        "paths": [str(path) for path in job.paths],
        "bytes": job.nbytes,
        "bits_per_weight": job.plan.bits_per_weight,
        "elements": job.plan.elements,
        "threads": threads,
        **needs_fields(forecast),
        "free_disk_bytes": free_disk(job.paths[0].parent),
        "notes": [{"level": note.level, "message": note.message} for note in job.plan.notes],
        "tensors": [
            {
                "name": item.tensor.name,
                "shape": list(item.tensor.shape),
                "source_dtype": item.tensor.dtype,
                "type": item.format,
                "bytes": item.nbytes,
                "importance": item.importance,
                "reason": item.reason,
            }
            for item in job.plan.items
        ],
    }
