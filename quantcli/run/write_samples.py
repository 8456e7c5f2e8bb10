"""The windows that a model writes itself, written before the methods of a run begin.

They are the same in every run on a machine, so that an interrupted run goes on with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from quantcli.artifacts.scratch_place import work_path
from quantcli.artifacts.write import default_threads
from quantcli.events import Events, in_phase
from quantcli.layerwise.checkpoint import checkpoint_folder
from quantcli.layerwise.devices import device_errors, torch_device
from quantcli.layerwise.own_samples import write_samples
from quantcli.layerwise.steady import use_threads
from quantcli.layerwise.walk import build_model
from quantcli.layerwise.windows import Ids
from quantcli.ranks.joined import active_group
from quantcli.run.calibrated_run import CalibratedRun, plan_passes
from quantcli.run.outputs import Planned
from quantcli.run.request import Request


def with_samples(planned: Sequence[Planned], request: Request) -> Events[list[Planned]]:
    """The outputs, the samples of their runs written; a run whose outputs are all whole goes on
    without.
    """
    found: dict[int, CalibratedRun] = {}
    for each in planned:
        run = each.run
        if run is None or run.written or id(run) in found or each.kept is not None:
            continue
        threads = request.threads or default_threads()
        place = checkpoint_folder(work_path(each.path, request.scratch))
        passes = plan_passes(replace(run, written=True), place, None, request.device, 0, threads)
        group = active_group()
        first, every = (0, 1) if group is None else (group.index, group.count)
        use_threads(threads, torch_device(passes.device).type)
        layers, length = build_model(passes, run.model), run.windows.ids.shape[1]
        with device_errors(passes.device):
            writing = write_samples(
                run.model, layers, run.samples, length, first=first, every=every
            )
            ids = yield from in_phase("writing samples", writing)
        if group is not None:
            group.add_up(counts := ids.astype(np.int64))
            ids = counts.astype(np.int32)
        found[id(run)] = fill(run, ids)
    return [replace(each, run=found.get(id(each.run), each.run)) for each in planned]


def fill(run: CalibratedRun, ids: Ids) -> CalibratedRun:
    """The run with its samples, int32 (samples, tokens)."""
    whole = np.concatenate([run.windows.ids[: -run.samples], ids])
    return replace(run, windows=replace(run.windows, ids=whole), written=True)
