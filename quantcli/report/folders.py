"""A model folder's plan for people and for programs: what each tensor becomes, and the costs."""

from __future__ import annotations

from typing import Any

from quantcli.artifacts.model_folder import ModelFolder
from quantcli.plan.budget import free_disk
from quantcli.plan.folders import Copy, Item
from quantcli.plan.linear_layers import natural
from quantcli.plan.needs import Forecast
from quantcli.report.needs import needs_facts, needs_fields
from quantcli.report.tables import Column, Table, facts
from quantcli.report.units import shape_text, size_text


def folder_tables(job: ModelFolder, threads: int, forecast: Forecast | None = None) -> list[Table]:
    """The stored tensors in order, and the totals."""
    rows = tuple(
        (
            _name(part),
            shape_text((part.rows, part.columns)),
            job.model.store.tensors[part.source].dtype,
            _label(job, part),
            size_text(job.nbytes_of(part)),
        )
        for part in _parts(job)
    )
    columns = (
        Column("tensor"),
        Column("shape"),
        Column("from"),
        Column("to"),
        Column("size", "right"),
    )
    count = len(job.weights.layouts)
    totals = [
        ("output", str(job.path)),
        ("files", f"{len(job.sizes)}, of them {count} with weights"),
        ("size", f"{size_text(job.nbytes)} ({job.nbytes:,} bytes)"),
        ("bits per weight", f"{job.bits_per_weight:.2f}"),
        ("quantized", f"{len(job.plan.items)} matrices to {job.plan.label}"),
        *_static_facts(job),
        *needs_facts(forecast, free_disk(job.path.absolute().parent)),
    ]
    return [Table(columns, rows), facts(totals)]


def folder_document(
    job: ModelFolder, threads: int, forecast: Forecast | None = None
) -> dict[str, Any]:
    """The same with exact numbers, for ``--json``."""
    return {
        "to": job.plan.recipe.to,
        "type": job.plan.label,
        "paths": [str(job.path)],
        "files": job.sizes,
        "bytes": job.nbytes,
        "bits_per_weight": job.bits_per_weight,
        "elements": job.plan.elements,
        "threads": threads,
        **needs_fields(forecast),
        "free_disk_bytes": free_disk(job.path.absolute().parent),
        "notes": [{"level": note.level, "message": note.message} for note in job.plan.notes],
        "kept_modules": list(job.plan.kept),
        **static_fields(job),
        "tensors": [
            {
                "name": _name(part),
                "source": part.source,
                "shape": [part.rows, part.columns],
                "source_dtype": job.model.store.tensors[part.source].dtype,
                "type": _label(job, part),
                "bytes": job.nbytes_of(part),
                "importance": isinstance(part, Item) and part.importance,
            }
            for part in _parts(job)
        ],
    }


def static_fields(job: ModelFolder) -> dict[str, Any]:
    """How many scales are found on a text, and of what; once they are, what was seen."""
    plan = job.plan
    if not plan.needs_text:
        return {}
    found: dict[str, Any] = {
        "activations": len(plan.static_items),
        "kv_cache": plan.recipe.kv_cache,
        "caches": len(plan.caches),
    }
    if job.scales is not None:
        found["inputs"] = {name: [e.low, e.high] for name, e in job.scales.inputs.items()}
        found["keys_and_values"] = {name: list(two) for name, two in job.scales.caches.items()}
    return {"static_scales": found}


def _static_facts(job: ModelFolder) -> list[tuple[str, str]]:
    plan = job.plan
    found = []
    if plan.static_items:
        found.append(f"activations of {len(plan.static_items)} matrices")
    if plan.caches:
        found.append(f"{plan.recipe.kv_cache} key-value caches of {len(plan.caches)} layers")
    return [("static scales", " and ".join(found))] if found else []


def _parts(job: ModelFolder) -> list[Item | Copy]:
    parts: list[Item | Copy] = [*job.plan.items, *job.plan.copies]
    return sorted(parts, key=lambda part: (natural(part.source), part.first))


def _name(part: Item | Copy) -> str:
    return part.source if isinstance(part, Copy) or part.format else part.matrix.module


def _label(job: ModelFolder, part: Item | Copy) -> str:
    if isinstance(part, Copy):
        return part.dtype
    if part.format or part.scheme is None:
        return f"{part.format} as {part.dtype}"
    return part.scheme.label
