"""Types by what they cost: survey a model, then choose within a size."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantcli.calib.checkpoint import checkpoint_folder
from quantcli.errors import PlanError
from quantcli.methods.job import MethodJob, plan_passes
from quantcli.methods.options import Options
from quantcli.methods.survey import Surveyed, survey
from quantcli.plan.allocate import allocate, find_candidates
from quantcli.plan.planner import Plan
from quantcli.types import Event, Note


@dataclass(frozen=True)
class Allocated(Event):
    """``tensor_types`` say REGEX=TYPE for every tensor that had a choice."""

    tensor_types: tuple[str, ...]
    note: Note


def survey_folder(output: Path) -> Path:
    """Where a survey keeps its work until the file is whole."""
    folder = checkpoint_folder(output)
    return folder.with_name(folder.name + "-survey")


def remove_survey(output: Path) -> None:
    """The file is whole."""
    shutil.rmtree(survey_folder(output), ignore_errors=True)


def choose_types(
    job: MethodJob, plan: Plan, output: Path, options: Options, limit: int, *,
    max_memory: int = 1 << 62, threads: int = 1,
) -> Iterator[Event]:  # fmt: skip
    """Yields progress, at last `Allocated`: ``limit`` bytes are for all tensors' data.

    What was surveyed stays in `survey_folder`, so a second call is quick. PlanError when nothing
    can be chosen or the limit is too small.
    """
    candidates = find_candidates(plan)
    if not candidates:
        raise PlanError(
            f"{plan.label} quantizes nothing whose type could be chosen",
            hint="leave --allocate out, or choose another type",
        )
    folder = survey_folder(output)
    folder.mkdir(exist_ok=True)
    run = plan_passes(job, folder, None, None, max_memory, threads)
    costs = None
    for event in survey(run, candidates, options):
        if isinstance(event, Surveyed):
            costs = event.costs
        else:
            yield event
    if costs is None:
        raise RuntimeError("the survey ended without a result")
    found = allocate(plan, costs, limit)
    left = len(candidates) - len(costs)
    note = Note(
        f"types chosen for {len(costs)} tensors: {found.nbytes:,} bytes of weights, for a KL "
        f"divergence of about {found.cost:.3g}; {plan.label} has {plan.data_bytes:,}, for about "
        f"{found.before:.3g}" + (f"; {left} others keep its types" if left else "")
    )
    yield Allocated(
        tuple(f"^{re.escape(name)}$={kind}" for name, kind in sorted(found.types.items())),
        note,
    )
