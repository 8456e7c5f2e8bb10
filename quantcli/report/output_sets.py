"""A set of outputs, for people and for programs: a line for each, and what all take together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantcli.plan.budget import free_disk
from quantcli.plan.needs import Forecast
from quantcli.plan.schemes import GGUF
from quantcli.report.needs import needs_facts, needs_fields
from quantcli.report.tables import Column, Table, facts
from quantcli.report.units import duration_text, size_text
from quantcli.run.outputs import Quantized


def set_document(
    outputs: Sequence[Quantized], documents: Sequence[dict[str, Any]], *, planned: bool
) -> dict[str, Any]:
    """Each output's own document, under "outputs", and the sums."""
    found: dict[str, Any] = {
        "outputs": list(documents),
        "paths": [path for document in documents for path in document["paths"]],
        "bytes": sum(output.artifact.nbytes for output in outputs),
        "source_bytes": outputs[0].artifact.source_bytes,
    }
    if planned:
        found |= {
            "bytes_to_write": _to_write(outputs),
            **needs_fields(_forecast(outputs)),
            "free_disk_bytes": _free(outputs),
        }
    return found


def set_tables(outputs: Sequence[Quantized]) -> list[Table]:
    """The planned outputs, and what they take together."""
    rows = tuple(
        (
            _label(output),
            f"{output.artifact.bits_per_weight:.2f}",
            size_text(output.artifact.nbytes),
            _remark(output),
        )
        for output in outputs
    )
    columns = (
        Column("type"),
        Column("bits per weight", "right"),
        Column("size", "right"),
        Column("note"),
    )
    total = sum(output.artifact.nbytes for output in outputs)
    needed, free = _to_write(outputs), _free(outputs)
    first = outputs[0].artifact.paths[0]
    totals = [
        ("folder", str(first.parent)),
        ("outputs", f"{len(outputs)}, {first.name} ..."),
        ("size", f"{size_text(total)} ({total:,} bytes)"),
        ("to read", f"{size_text(outputs[0].artifact.source_bytes)}, once"),
        *needs_facts(_forecast(outputs), free, too_little=free < needed),
    ]
    return [Table(columns, rows), facts(totals)]


def set_sentence(outputs: Sequence[Quantized], seconds: float) -> str:
    """How many there are now, and how long it took."""
    made = [output for output in outputs if not output.kept]
    total = sum(output.artifact.nbytes for output in made)
    return (
        f"{len(made)} of {len(outputs)} outputs made, {size_text(total)} from "
        f"{size_text(outputs[0].artifact.source_bytes)}, in {duration_text(seconds)}"
    )


def line_of(output: Quantized) -> str:
    """An output of a set as it is whole."""
    artifact = output.artifact
    return (
        f"{_label(output)}: {size_text(artifact.nbytes)} at {artifact.bits_per_weight:.2f} bits "
        f"per weight{', whole before' if output.kept else ''}"
    )


def _label(output: Quantized) -> str:
    recipe, label = output.artifact.plan.recipe, output.artifact.plan.label
    if output.is_tower:
        return f"mmproj {label}"
    return label if recipe.to == GGUF else f"{recipe.to} {label}"


def _remark(output: Quantized) -> str:
    """What sets an output apart from its fellows."""
    recipe, plan = output.artifact.plan.recipe, output.artifact.plan
    warnings = sum(note.level == "warning" for note in plan.notes)
    parts = [
        "whole already" if output.kept else "",
        f"method {recipe.method}" if recipe.method else "",
        "types are chosen as it runs" if recipe.allocate or recipe.target_size else "",
        "by the importance matrix" if recipe.imatrix else "",
        f"{warnings} warning{'s' if warnings > 1 else ''}" if warnings else "",
    ]
    return "; ".join(filter(None, parts))


def _to_write(outputs: Sequence[Quantized]) -> int:
    return sum(output.artifact.nbytes for output in outputs if not output.kept)


def _forecast(outputs: Sequence[Quantized]) -> Forecast:
    """Of all runs, one after the other; what one keeps stays until the last has ended."""
    found = {id(each.forecast): each.forecast for each in outputs if each.forecast is not None}
    return Forecast(
        max((forecast.base for forecast in found.values()), default=0),
        [stage for forecast in found.values() for stage in forecast.stages],
        sum(forecast.seconds or 0.0 for forecast in found.values()),
    )


def _free(outputs: Sequence[Quantized]) -> int:
    return free_disk(outputs[0].artifact.paths[0].absolute().parent)
