"""Types or schemes for rounding to nearest by an importance matrix.

How much a tensor's outputs matter to predictions, an importance matrix does not tell. That is
measured on the texts that made it, or without texts on random tokens, which lead to nearly the same
choice: on a small model they forwent 17 % of what texts forecast that choosing saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quantcli.artifacts.scratch_place import work_path
from quantcli.events import Events, in_phase
from quantcli.layerwise.texts import read_texts
from quantcli.plan.allocate import Costs
from quantcli.plan.recipe import is_allocated, value_of
from quantcli.rounding.nearest import NEAREST
from quantcli.rounding.options import Options
from quantcli.run.allocation_targets import Candidates, Target, find_target
from quantcli.run.calibrate import states_memory
from quantcli.run.calibrated_run import prepare_random_run, prepare_run, remove_costs
from quantcli.run.choose_types import choose_types
from quantcli.run.measure_costs import measure_costs
from quantcli.run.outputs import Planned
from quantcli.run.request import Request
from quantcli.run.survey import Survey

WINDOWS = 40
"""Of random tokens, where there are no texts."""


def choose_by_importance(request: Request, planned: Sequence[Planned]) -> Events[list[Planned]]:
    """The outputs, those that ask for it with their kinds chosen; one survey serves all.

    SourceError for a model that cannot be run.
    """
    targets = {
        each.path: find_target(
            each.artifact.model, each.artifact, each.path, each.artifact.importance
        )
        for each in planned
        if is_allocated(each.artifact.plan.recipe) and not each.is_tower
    }
    surveys: dict[tuple[int, int], Survey] = {}
    ready = []
    for each in planned:
        target = targets.get(each.path)
        if target is None:
            ready.append(each)
            continue
        key = id(target.model), id(target.importance)
        if key not in surveys:
            alike = [t for t in targets.values() if (id(t.model), id(t.importance)) == key]
            surveys[key] = _survey(request, each, alike)
        choice = choose_types(target, surveys[key].costs)
        artifact = yield from in_phase(f"choosing {target.noun}s", choice)
        ready.append(replace(each, artifact=artifact))
    for each in planned:
        remove_costs(work_path(each.path, request.scratch))
    return ready


def _survey(request: Request, planned: Planned, targets: Sequence[Target]) -> Survey:
    artifact = planned.artifact
    model, importance, recipe = artifact.model, artifact.importance, artifact.plan.recipe
    if importance is None:
        raise ValueError("nothing tells what types cost")
    if request.texts:
        texts, share = read_texts(list(request.texts)), value_of(recipe, "random_share")
        run = prepare_run(model, texts, chunks=request.chunks, random_share=share)
    else:
        run = prepare_random_run(model, WINDOWS)
    options = Options(rounder=NEAREST.name)

    def measure(candidates: Candidates) -> Events[Costs]:
        return measure_costs(
            run, work_path(planned.path, request.scratch), candidates, options,
            max_memory=states_memory(), threads=planned.threads, importance=importance,
            device=request.device,
        )  # fmt: skip

    return Survey(targets, measure)
