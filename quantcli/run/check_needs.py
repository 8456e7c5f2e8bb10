"""Whether what a run needs is there and allowed, before the work: memory, scratch disk, room.

``--max-memory`` and ``--max-scratch`` are kept by the run's own choices where there are any (hidden
states in a file instead of memory, fewer threads); what no choice makes small enough is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from quantcli.artifacts.scratch_place import used_bytes, work_path
from quantcli.artifacts.stream import STREAM
from quantcli.errors import OutputError, PlanError
from quantcli.plan.budget import existing_place, free_disk
from quantcli.plan.needs import SAMPLES, Forecast
from quantcli.run.outputs import Planned
from quantcli.run.request import Request

_ROUND = 10**6


def refuse_memory(label: str, least: Forecast, allowed: int) -> None:
    """PlanError where the run needs more memory than ``allowed`` bytes, however it is run."""
    if least.memory > allowed:
        raise PlanError(
            f"{label} needs about {least.memory:,} bytes of memory at its {least.hungriest}, more "
            f"than the {allowed:,} allowed",
            hint=f"--max-memory {-(-least.memory // _ROUND)}M is the least that is enough",
        )


def refuse_samples(label: str, forecast: Forecast, allowed: int) -> None:
    """PlanError where a model that is to write samples does not fit into ``allowed`` bytes."""
    needed = max((s.memory for s in forecast.stages if s.name == SAMPLES), default=0)
    needed += forecast.base if needed else 0
    if needed > allowed:
        raise PlanError(
            f"{label}: the model writes samples with all its weights in memory, which takes about "
            f"{needed:,} bytes, more than the {allowed:,} there are",
            hint="--sample-share 0 calibrates without them",
        )


def refuse_scratch(label: str, least: Forecast, allowed: int) -> None:
    """PlanError where the run needs more scratch disk than ``allowed`` bytes."""
    if least.scratch > allowed:
        raise PlanError(
            f"{label} needs about {least.scratch:,} bytes of scratch disk, more than the "
            f"{allowed:,} allowed",
            hint=f"--max-scratch {-(-least.scratch // _ROUND)}M is the least that is enough; fewer "
            "--chunks or --fisher-windows need less",
        )


def check_room(request: Request, planned: Sequence[Planned], held: Sequence[int]) -> None:
    """OutputError unless outputs and scratch files fit on their disks together.

    ``held`` are bytes of each output that an earlier run has left in its place.
    """
    outputs: dict[int, int] = defaultdict(int)
    early: dict[int, int] = defaultdict(int)
    scratch: dict[int, int] = defaultdict(int)
    kept: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    seen: set[int] = set()
    for each, there in zip(planned, held, strict=True):
        if each.kept is not None or each.path == STREAM:
            continue
        folder = each.path.absolute().parent
        disk = _disk(folder)
        folders.setdefault(disk, folder)
        outputs[disk] += each.artifact.nbytes - there
        if each.in_place:
            early[disk] += each.artifact.nbytes - there
        forecast = each.forecast
        if forecast is None or id(forecast) in seen:
            continue
        seen.add(id(forecast))
        work = work_path(each.path, request.scratch)
        own = _disk(work.absolute().parent)
        folders.setdefault(own, work.absolute().parent)
        left = used_bytes(work)
        scratch[own] += max(0, forecast.scratch - left)
        kept[own] += max(0, forecast.kept - left)
    for disk, folder in folders.items():
        # An output is written when the most scratch is gone, if not from the first layer on.
        needed = max(early[disk] + scratch[disk], outputs[disk] + kept[disk])
        free = free_disk(folder)
        if needed > free:
            beside = f" and {scratch[disk]:,} of scratch files" if scratch[disk] else ""
            what = (
                f"{outputs[disk]:,} bytes of output{beside}"
                if outputs[disk]
                else (f"{scratch[disk]:,} bytes of scratch files")
            )
            elsewhere = ", or put scratch files elsewhere with --scratch" if scratch[disk] else ""
            raise OutputError(
                f"not enough disk at {folder}: {what} needed, {free:,} bytes free",
                hint="free some space, choose another folder with -o, or a smaller type or fewer "
                f"outputs{elsewhere}",
            )


def _disk(folder: Path) -> int:
    return existing_place(folder).stat().st_dev
