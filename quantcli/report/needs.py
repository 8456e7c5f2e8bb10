"""What a run will need, for people and for programs: memory, scratch disk, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantcli.plan.needs import Forecast
from quantcli.report.tables import Table, facts
from quantcli.report.units import duration_text, size_text


def needs_facts(
    forecast: Forecast | None, free: int, *, too_little: bool = False
) -> list[tuple[str, str]]:
    """Lines of a plan's totals; ``free`` is what the disk of the output has."""
    found = []
    if forecast is not None:
        stage = f", at {forecast.hungriest}" if len(forecast.stages) > 1 else ""
        found.append(("peak memory", f"about {size_text(forecast.memory)}{stage}"))
        if forecast.scratch:
            found.append(("scratch disk", f"about {size_text(forecast.scratch)} while it runs"))
        if forecast.seconds is not None:
            # Less cannot be told apart from what starting takes.
            found.append(("time", f"about {duration_text(max(forecast.seconds, 0.1))}"))
    return [*found, ("free disk", size_text(free) + (", too little" if too_little else ""))]


def needs_fields(forecast: Forecast | None) -> dict[str, Any]:
    """The same with exact numbers, for ``--json``."""
    if forecast is None:
        return {}
    return {
        "peak_memory_bytes": forecast.memory,
        "scratch_bytes": forecast.scratch,
        "estimated_seconds": forecast.seconds,
    }


def needs_table(first: Sequence[tuple[str, str]], document: Mapping[str, Any]) -> Table:
    """A table of ``first`` and of what an object with `needs_fields` says."""
    return facts(
        [
            *first,
            ("peak memory", f"about {size_text(document['peak_memory_bytes'])}"),
            ("scratch disk", f"about {size_text(document['scratch_bytes'])} while it runs"),
            ("time", f"about {duration_text(document['estimated_seconds'])}"),
            ("free disk", size_text(document["free_disk_bytes"])),
        ]
    )
