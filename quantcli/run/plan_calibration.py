"""What a calibration will need, before it begins, and the plan that its dry run shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from quantcli.calibration import CalibrationJob
from quantcli.layerwise.pass_needs import primitives_bytes
from quantcli.plan.needs import Forecast
from quantcli.rounding.options import Options
from quantcli.run.forecast import make_forecast
from quantcli.run.rounding_stages import passes_of
from quantcli.run.unit_costs import measure_unit_costs
from quantcli.statistics.importance_file import output_paths
from quantcli.statistics.input_needs import collecting_stages


@dataclass(frozen=True)
class CalibrationPlan:
    """A calibration that was planned alone: its files, how the model is run, and what it needs."""

    paths: tuple[Path, ...]
    windows: int
    tokens: int
    dtype: str
    device: str
    forecast: Forecast


def forecast_calibration(job: CalibrationJob) -> Forecast:
    """Memory, scratch disk and work; the files that it makes are no scratch."""
    run = job.run
    passes = passes_of(run.model, run.windows, run.dtype)
    if passes is None:
        return make_forecast((), runs=True)
    in_memory = passes.states <= run.max_memory
    more = primitives_bytes(passes)
    stages = collecting_stages(passes, job.needs, in_memory=in_memory)
    return make_forecast(
        [replace(stage, memory=stage.memory + more) for stage in stages], runs=True
    )


def plan_calibration(job: CalibrationJob, forecast: Forecast) -> CalibrationPlan:
    """The plan, with the time that it takes."""
    run = job.run
    file = next((info.file for info in run.model.store.tensors.values()), None)
    costs = measure_unit_costs({}, (), Options(), threads=run.threads, file=file, dtype=run.dtype)
    count, tokens = run.windows.ids.shape
    return CalibrationPlan(
        tuple(output_paths(job.output, job.needs)), count, tokens, run.dtype, run.device,
        replace(forecast, seconds=costs.seconds(forecast.work)),
    )  # fmt: skip
