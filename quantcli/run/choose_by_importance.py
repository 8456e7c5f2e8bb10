"""Types or schemes by an importance matrix, without running the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quantcli.events import Events, in_phase
from quantcli.plan.allocate import Costs
from quantcli.plan.recipe import is_allocated
from quantcli.run.allocation_targets import Candidates, Target, find_target
from quantcli.run.choose_types import choose_types
from quantcli.run.importance_costs import measure_importance_costs
from quantcli.run.outputs import Planned
from quantcli.run.survey import Survey


def choose_by_importance(planned: Sequence[Planned]) -> Events[list[Planned]]:
    """The outputs, those that ask for it with their kinds chosen; one survey serves all."""
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
            surveys[key] = _survey(each, alike)
        choice = choose_types(target, surveys[key].costs)
        artifact = yield from in_phase(f"choosing {target.noun}s", choice)
        ready.append(replace(each, artifact=artifact))
    return ready


def _survey(planned: Planned, targets: Sequence[Target]) -> Survey:
    model, importance = planned.artifact.model, planned.artifact.importance
    if importance is None:
        raise ValueError("nothing tells what types cost")

    def measure(candidates: Candidates) -> Events[Costs]:
        return measure_importance_costs(model, importance, candidates, planned.threads)

    return Survey(targets, measure)
