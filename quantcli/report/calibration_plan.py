"""A calibration that was planned alone, for people and for programs."""

from __future__ import annotations

from typing import Any

from quantcli.plan.budget import free_disk
from quantcli.report.needs import needs_fields, needs_table
from quantcli.report.tables import Table
from quantcli.run.plan_calibration import CalibrationPlan


def plan_document(plan: CalibrationPlan) -> dict[str, Any]:
    """The fields of the JSON object."""
    return {
        "paths": [str(path) for path in plan.paths],
        "chunks": plan.windows,
        "chunk_size": plan.tokens,
        "dtype": plan.dtype,
        "device": plan.device,
        **needs_fields(plan.forecast),
        "free_disk_bytes": free_disk(plan.paths[0].absolute().parent),
    }


def plan_table(document: dict[str, Any]) -> Table:
    """The same as a table, made of the object."""
    return needs_table(
        [
            ("output", " and ".join(document["paths"])),
            ("text", f"{document['chunks']} windows of {document['chunk_size']} tokens"),
            ("products", f"in {document['dtype']} on {document['device']}"),
        ],
        document,
    )
