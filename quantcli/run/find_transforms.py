"""Transforms before rounding: calibrate what they need, find them, and go on with their model.

What was calibrated lies in a folder beside the output for the time of the search. A run that was
interrupted searches again and finds the same, since nothing in it is drawn by chance.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantcli.calibration import Calibrated, execute
from quantcli.calibration import prepare as prepare_calibration
from quantcli.model import Model
from quantcli.plan.folders import FolderPlan
from quantcli.plan.planner import Plan
from quantcli.run.job import MethodJob
from quantcli.run.methods import Chain
from quantcli.sources.imatrix import Importance, read_importance
from quantcli.statistics.importance_file import stats_path
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.statistics.statistics_file import StatisticsFile
from quantcli.transforms.chain import (
    Settings,
    TransformsApplied,
    check_transforms,
    needed_statistics,
    transform_model,
)
from quantcli.transforms.output_error import RoundRows, block_grids, integer_grid
from quantcli.transforms.transformed_statistics import TransformedStatistics, transform_importance
from quantcli.types import Event


@dataclass(frozen=True, slots=True)
class Moved(Event):
    """The transforms are found: the model with them, and the importance of its columns.

    ``importance`` is None where feedback comes next, which measures its own, and where ranges
    are found without.
    """

    model: Model
    importance: Importance | None


def find_transforms(
    planned: MethodJob,
    chain: Chain,
    plan: Plan | FolderPlan,
    output: Path,
    *,
    max_memory: int,
    threads: int,
) -> Iterator[Event]:
    """Yield notes and progress, at last `Moved`; errors before any work for what does not fit."""
    model, cut = planned.model, planned.cut
    check_transforms(model, chain.transforms)
    needs = needed_statistics(chain.transforms)
    if not chain.rounds and "hessian" not in needs:
        needs = ("hessian", *needs)
    settings = _settings(plan, chain, threads)
    if not needs:
        yield from _finish(transform_model(model, chain.transforms, {}, None, settings))
        return
    grids = find_grids(plan)
    folder = output.with_name(f".{output.name}.transform")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        path = folder / "inputs.gguf"
        job = prepare_calibration(
            model, cut.texts, path, ctx=cut.ctx, chunks=cut.chunks, seed=cut.seed, collect=needs,
            max_memory=max_memory, threads=threads,
        )  # fmt: skip
        for event in execute(job):
            if not isinstance(event, Calibrated):
                yield event
        with StatisticsFile(stats_path(path)) as measured:
            found = transform_model(model, chain.transforms, grids, measured, settings)
            importance = read_importance(path) if settings.weighted and not chain.rounds else None
            yield from _finish(found, importance, measured)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_grids(plan: Plan | FolderPlan) -> dict[str, RoundRows]:
    """The grid that each GGUF tensor's weights will be written in, of those that are rounded.

    PlanError for a folder's grid that leaves nothing to search.
    """
    if isinstance(plan, Plan):
        return block_grids({i.tensor.name: i.format for i in plan.items if i.importance})
    if plan.scheme is None:
        formats = {i.matrix.tensor: i.format for i in plan.items if i.format and i.importance}
        return block_grids(formats)
    grid = integer_grid(plan.scheme.grid, plan.scheme.search)
    return {item.matrix.tensor: grid for item in plan.items}


def _settings(plan: Plan | FolderPlan, chain: Chain, threads: int) -> Settings:
    if isinstance(plan, Plan):
        return Settings(feedback=chain.feedback, threads=threads)
    return Settings(
        weighted=plan.scheme is None or plan.scheme.weighted,
        feedback=chain.feedback,
        groups=plan.scheme is not None and plan.scheme.grid.strategy == "group",
        threads=threads,
        dtypes={copy.source: copy.dtype for copy in plan.copies},
    )


def _finish(
    events: Iterator[Event],
    importance: Importance | None = None,
    measured: InputStatistics | None = None,
) -> Iterator[Event]:
    for event in events:
        if not isinstance(event, TransformsApplied):
            yield event
            continue
        for transform in event.transforms:
            if importance is not None and measured is not None:
                importance = transform_importance(importance, transform, measured)
                measured = TransformedStatistics(measured, transform)
        yield Moved(event.model, importance)
