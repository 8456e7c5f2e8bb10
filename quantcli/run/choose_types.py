"""Types by what they cost: survey a model, then choose within a size."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from quantcli.artifacts.gguf_file import GgufFile, prepare_gguf
from quantcli.errors import PlanError
from quantcli.layerwise.checkpoint import checkpoint_folder
from quantcli.plan.allocate import Allocation, allocate, find_candidates
from quantcli.plan.recipe import merge_recipe
from quantcli.plan.size_text import parse_size
from quantcli.rounding.options import Options
from quantcli.run.job import MethodJob, plan_passes
from quantcli.run.type_costs import Surveyed, survey
from quantcli.types import Event, Note


@dataclass(frozen=True)
class Allocated(Event):
    """A job whose recipe gives every tensor that had a choice its type by name."""

    job: GgufFile


def survey_folder(output: Path) -> Path:
    """Where a survey keeps its work until the file is whole."""
    folder = checkpoint_folder(output)
    return folder.with_name(folder.name + "-survey")


def remove_survey(output: Path) -> None:
    """The file is whole."""
    shutil.rmtree(survey_folder(output), ignore_errors=True)


def allocate_job(
    planned: MethodJob, job: GgufFile, output: Path, options: Options, *,
    max_memory: int = 1 << 62, threads: int = 1,
) -> Iterator[Event]:  # fmt: skip
    """Yields progress and a note, at last `Allocated`: within the recipe's target_size, or the
    size that ``job`` has.

    What was surveyed stays in `survey_folder`, so a second call is quick. PlanError when nothing
    can be chosen or the size is too small.
    """
    plan = job.plan
    candidates = find_candidates(plan)
    if not candidates:
        raise PlanError(
            f"{plan.label} quantizes nothing whose type could be chosen",
            hint="leave out --allocate or --quality high, or choose another type",
        )
    target = plan.recipe.target_size
    whole = parse_size(target) if target else job.nbytes
    # Before the long run: whether anything can be that small. The recipe in the file names the
    # types, and takes bytes itself.
    free = {name: dict.fromkeys(kinds, 0.0) for name, kinds in candidates.items()}
    smallest = allocate(plan, free, 1 << 62)
    beside = _with_types(planned, job, output, smallest).nbytes - smallest.nbytes
    allocate(plan, free, whole - beside, beside=beside)
    folder = survey_folder(output)
    folder.mkdir(exist_ok=True)
    run = plan_passes(planned, folder, None, None, max_memory, threads)
    costs = None
    try:
        for event in survey(run, candidates, options):
            if isinstance(event, Surveyed):
                costs = event.costs
            else:
                yield event
    finally:
        if costs is None:
            remove_survey(output)
    if costs is None:
        raise RuntimeError("the survey ended without a result")
    while True:
        found = allocate(plan, costs, whole - beside, beside=beside)
        chosen = _with_types(planned, job, output, found)
        if chosen.nbytes <= whole:
            break
        beside += chosen.nbytes - whole
    left = len(candidates) - len(costs)
    yield Note(
        f"types chosen for {len(costs)} tensors: {found.nbytes:,} bytes of weights, for a KL "
        f"divergence of about {found.cost:.3g}; {plan.label} has {plan.data_bytes:,}, for about "
        f"{found.before:.3g}" + (f"; {left} others keep its types" if left else "")
    )
    yield Allocated(chosen)


def _with_types(planned: MethodJob, job: GgufFile, output: Path, found: Allocation) -> GgufFile:
    types = [f"^{re.escape(name)}$={kind}" for name, kind in sorted(found.types.items())]
    named = merge_recipe(job.plan.recipe, tensor_types=types)
    named = replace(named, allocate=False, target_size=None)
    return prepare_gguf(
        planned.model, named, output, importance=planned.importance, force=job.force
    )
