"""Scales of a folder that are found on texts: what they need, and what statistics say of them.

Of int8 the range is the one of least squared error, unless ``--range minmax`` asks for extremes.
Matrices that servers run as one share the widest. An expert that saw few tokens takes the
extremes of all experts of its layer, since the largest of a few values says little of what will
come, and clipped activations cost more than a coarse scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantcli.artifacts.model_folder import ModelFolder
from quantcli.artifacts.static_scales import StaticScales
from quantcli.errors import SourceError
from quantcli.events import Events
from quantcli.layouts.base import Extremes
from quantcli.plan.folders import FolderPlan
from quantcli.plan.fused import fused_with
from quantcli.plan.schemes import Scheme
from quantcli.run.outputs import needed_statistics
from quantcli.sources.imatrix import ENOUGH_TOKENS
from quantcli.statistics.input_ranges import narrow
from quantcli.statistics.input_statistics import HISTOGRAM, MIN_MAX
from quantcli.statistics.statistics_file import StatisticsFile, cache_name
from quantcli.types import Matrix, Note

if TYPE_CHECKING:
    from quantcli.run.calibrated_run import CalibratedRun
    from quantcli.run.text_statistics import TextStatistics


def take_scales(artifact: ModelFolder, path: Path) -> ModelFolder:
    """The folder with its scales from the statistics file ``path``, and remarks in its plan.

    SourceError where the file says nothing, or nothing but zeros, of what is needed.
    """
    with StatisticsFile(path) as statistics:
        found = _Reader(statistics, artifact.plan)
        scales = StaticScales(found.inputs(), found.caches())
    plan = artifact.plan
    if found.few:
        few = Note(
            f"{found.few} experts saw fewer than {ENOUGH_TOKENS} tokens; the scales of their "
            "activations are those of the largest of their layer's experts",
            "warning",
        )
        plan = replace(plan, notes=(*plan.notes, few))
    if found.unspread:
        missing = Note(
            f"{path} has no histogram of the inputs of {found.unspread} matrices, so their scales "
            f"are those of the extremes; calibrate with --collect {MIN_MAX},{HISTOGRAM} for the "
            "least squared error",
            "warning",
        )
        plan = replace(plan, notes=(*plan.notes, missing))
    return replace(artifact, scales=scales, plan=plan)


def calibrate_scales(
    run: CalibratedRun, artifact: ModelFolder, statistics: TextStatistics
) -> Events[ModelFolder]:
    """The folder with scales from a walk of ``run``'s text through its model."""
    from quantcli.statistics.importance_file import stats_path

    path = yield from statistics.measure(run, needed_statistics(artifact))
    return take_scales(artifact, stats_path(path))


class _Reader:
    """Reads what a plan needs from statistics."""

    def __init__(self, statistics: StatisticsFile, plan: FolderPlan) -> None:
        self._statistics = statistics
        self._plan = plan
        self._scarce: set[tuple[str, int]] = set()
        self.unspread = 0

    @property
    def few(self) -> int:
        """Experts that saw few tokens."""
        return len(self._scarce)

    def inputs(self) -> dict[str, Extremes]:
        """By linear module."""
        items = self._plan.static_items
        own = {
            item.matrix.module: self._seen(item.matrix, item.scheme)
            for item in items
            if item.scheme is not None
        }
        found = {}
        for module in own:
            parts = [own[part] for part in fused_with(module) if part in own]
            widest = own[module]
            for part in parts:
                widest = widest.join(part)
            if not widest.largest > 0:
                raise SourceError(
                    f"{self._statistics.path}: the inputs of {module} were all zero, so that no "
                    "static scale can be found",
                    hint=f"calibrate on another text, or --keep '{module}'",
                )
            found[module] = widest
        return found

    def caches(self) -> dict[str, tuple[float, float]]:
        """The largest key and value by attention module."""
        found = {}
        for owner in self._plan.caches:
            keys, values = self._statistics.cache_max(owner.layer)
            if not (_is_size(keys) and _is_size(values)):
                raise SourceError(
                    f"{self._statistics.path}: the largest key and value of layer {owner.layer} "
                    f"are {keys:g} and {values:g}, of which no scale can be made",
                    hint="calibrate on another text, or leave --kv-cache out",
                )
            found[owner.module] = keys, values
        known = {owner.layer for owner in self._plan.caches}
        for layer in range(max(known, default=-1) + 1):
            if layer not in known and self._statistics.has(cache_name(layer), "k_max"):
                raise SourceError(
                    f"layer {layer} has a key-value cache, but its attention is not named as "
                    "servers know it",
                    hint="leave --kv-cache out",
                )
        return found

    def _seen(self, matrix: Matrix, scheme: Scheme) -> Extremes:
        statistics, name = self._statistics, matrix.tensor
        if scheme.has_zero_points and not statistics.has(name, "min"):
            raise SourceError(
                f"{statistics.path} has no min of {name}, which zero points of activations need",
                hint=f"calibrate again with --collect {MIN_MAX}",
            )
        shape = statistics.matrices(name), statistics.columns(name)
        if all(shape) and shape != (matrix.of, matrix.columns):
            raise SourceError(
                f"{statistics.path}: {name} is {shape[0]} x {shape[1]} columns there, and "
                f"{matrix.of} x {matrix.columns} in the model",
                hint="the statistics belong to another model",
            )
        if matrix.of > 1 and statistics.count(name, matrix.index) < ENOUGH_TOKENS:
            self._scarce.add((name.partition(".ffn_")[0], matrix.index))
            return self._range(name, range(statistics.matrices(name)), scheme)
        return self._range(name, [matrix.index], scheme)

    def _range(self, name: str, matrices: Sequence[int], scheme: Scheme) -> Extremes:
        seen = self._extremes(name, matrices)
        if not scheme.narrows_inputs or not seen.largest > 0:
            return seen
        if not self._statistics.has(name, HISTOGRAM):
            self.unspread += 1
            return seen
        total = sum(self._statistics.histogram(name, matrix) for matrix in matrices)
        return narrow(np.asarray(total), seen, symmetric=not scheme.has_zero_points)

    def _extremes(self, name: str, matrices: Sequence[int]) -> Extremes:
        pairs = [self._statistics.min_max(name, matrix) for matrix in matrices]
        low, high = min(low for low, _ in pairs), max(high for _, high in pairs)
        if not np.isfinite([value for pair in pairs for value in pair]).all():
            raise SourceError(f"{self._statistics.path}: the extremes of {name} are not finite")
        return Extremes(min(low, 0.0), max(high, 0.0))


def _is_size(value: float) -> bool:
    return bool(np.isfinite(value) and value > 0)
