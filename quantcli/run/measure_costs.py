"""Costs by running the model, in a folder next to the output that keeps them for a second call."""

from __future__ import annotations

from pathlib import Path

from quantcli.artifacts.staging import own_folder
from quantcli.events import Events
from quantcli.layerwise.ranked_run import begin_folder, leads, share_windows
from quantcli.plan.allocate import Costs
from quantcli.rounding.options import Options
from quantcli.run.allocation_targets import Candidates
from quantcli.run.calibrated_run import CalibratedRun, costs_folder, plan_passes, remove_costs
from quantcli.run.type_costs import measure_type_costs, survey_windows
from quantcli.sources.imatrix import Importance


def measure_costs(
    run: CalibratedRun, output: Path, candidates: Candidates, options: Options, *,
    max_memory: int, threads: int, importance: Importance | None = None, device: str | None = None,
) -> Events[Costs]:  # fmt: skip
    """`measure_type_costs`, whose work lies in ``output``'s `costs_folder`."""
    folder = costs_folder(output)
    try:
        begin_folder(folder, empty=False)
        passes = plan_passes(run, folder, None, device, max_memory, threads)
        passes = share_windows(passes, survey_windows(passes, options))
        if passes.ranks is not None:
            own_folder(passes.folder, empty=False)
        return (yield from measure_type_costs(passes, candidates, options, importance))
    except BaseException:
        if leads():
            remove_costs(output)
        raise
