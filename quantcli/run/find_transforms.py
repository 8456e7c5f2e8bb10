"""Transforms before rounding: calibrate what they need, find them, return the transformed model.

An interrupted run searches again and finds the same, since nothing in it is random.
"""

from __future__ import annotations

from quantcli.events import Events, take
from quantcli.model import Model
from quantcli.plan.folders import FolderPlan
from quantcli.plan.planner import Plan
from quantcli.run.calibrated_run import CalibratedRun
from quantcli.run.methods import Chain
from quantcli.run.text_statistics import TextStatistics
from quantcli.sources.imatrix import Importance, read_importance
from quantcli.statistics.importance_file import stats_path
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.statistics.statistics_file import StatisticsFile
from quantcli.transforms.base import TransformOptions
from quantcli.transforms.chain import (
    TransformsApplied,
    check_transforms,
    needed_statistics,
    transform_model,
)
from quantcli.transforms.output_error import RoundRows, block_grids, folder_grid
from quantcli.transforms.transformed_statistics import TransformedStatistics, transform_importance


def find_transforms(
    planned: CalibratedRun,
    chain: Chain,
    plan: Plan | FolderPlan,
    statistics: TextStatistics,
    *,
    threads: int,
) -> Events[tuple[Model, Importance | None]]:
    """The model with its transforms, and the importance of its columns.

    The latter is None where feedback comes next, which measures its own, and where ranges are
    found without. Errors come before any work for what does not fit.
    """
    model = planned.model
    check_transforms(model, chain.transforms)
    needs = needed_statistics(chain.transforms)
    if not chain.rounds and "hessian" not in needs:
        needs = ("hessian", *needs)
    options = _options(plan, chain, threads)
    if not needs:
        found = transform_model(model, chain.transforms, {}, None, options)
        return (yield from take(found, TransformsApplied)).model, None
    grids = find_grids(plan)
    path = yield from statistics.measure(planned, needs)
    with StatisticsFile(stats_path(path)) as measured:
        events = transform_model(model, chain.transforms, grids, measured, options)
        applied = yield from take(events, TransformsApplied)
        importance = read_importance(path) if options.weighted and not chain.rounds else None
        return applied.model, _carry(importance, applied, measured)


def find_grids(plan: Plan | FolderPlan) -> dict[str, RoundRows]:
    """The grid that each GGUF tensor's weights will be written in, of those that are rounded.

    PlanError for a folder's grid that leaves nothing to search.
    """
    if isinstance(plan, Plan):
        return block_grids({i.tensor.name: i.format for i in plan.items if i.importance})
    if not plan.schemes:
        formats = {i.matrix.tensor: i.format for i in plan.items if i.format and i.importance}
        return block_grids(formats)
    return {
        item.matrix.tensor: folder_grid(item.scheme.grid, item.scheme.search)
        for item in plan.items
        if item.scheme is not None
    }


def _options(plan: Plan | FolderPlan, chain: Chain, threads: int) -> TransformOptions:
    if isinstance(plan, Plan):
        return TransformOptions(feedback=chain.feeds_back, threads=threads)
    return TransformOptions(
        weighted=all(scheme.weighted for scheme in plan.schemes),
        feedback=chain.feeds_back,
        groups=any(scheme.grid.strategy == "group" for scheme in plan.schemes),
        threads=threads,
        dtypes={copy.source: copy.dtype for copy in plan.copies},
    )


def _carry(
    importance: Importance | None, applied: TransformsApplied, measured: InputStatistics
) -> Importance | None:
    """The importance through the transforms, one after the other."""
    if importance is None:
        return None
    for transform in applied.transforms:
        importance = transform_importance(importance, transform, measured)
        measured = TransformedStatistics(measured, transform)
    return importance
