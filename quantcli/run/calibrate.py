"""A calibration from a model's name to files, and the one that a quantization makes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantcli.artifacts.scratch_place import folder_bytes, work_path
from quantcli.artifacts.write import default_threads
from quantcli.calibration import CalibrationDone, CalibrationJob, execute, merge, prepare
from quantcli.errors import QuantcliError
from quantcli.events import Events, in_phase, take
from quantcli.layerwise.checkpoint import was_interrupted
from quantcli.layerwise.texts import read_texts
from quantcli.model import Model, open_model
from quantcli.plan.budget import check_disk
from quantcli.run.check_needs import refuse_scratch
from quantcli.run.plan_calibration import (
    CalibrationPlan,
    forecast_calibration,
    plan_calibration,
)
from quantcli.run.remote_note import note_remote
from quantcli.run.request import Request
from quantcli.sources.imatrix import Importance, read_importance
from quantcli.statistics.token_counts import count_tokens
from quantcli.systems import machine_memory
from quantcli.types import Note


def states_memory() -> int:
    """Bytes of hidden states that may stay in memory: a quarter of what the machine has."""
    return machine_memory() // 4


def calibrate(
    source: str, output: Path | None, texts: Sequence[str], *, field: str | None = None,
    pre: str | None = None, max_memory: int | None = None, threads: int | None = None,
    legacy: bool = False, download: bool = False, max_scratch: int | None = None,
    on_fetch: Callable[..., None] | None = None, **settings: Any,
) -> Events[CalibrationDone | CalibrationPlan]:  # fmt: skip
    """Run a model on texts; ``settings`` are those of `quantcli.calibration.prepare`.

    ``on_fetch`` takes the progress of a download. Ends with the plan of a dry run. PlanError where
    the run's own files would take more than ``max_scratch`` bytes, OutputError without room.
    """
    read = read_texts(texts, field=field)
    with open_model(source, pre=pre, table=False, download=download, on_progress=on_fetch) as model:
        yield from note_remote(model)
        job = prepare(
            model, read, output or default_path(source, legacy=legacy),
            max_memory=max_memory or states_memory(), threads=threads or default_threads(),
            legacy=legacy, **settings,
        )  # fmt: skip
        forecast = forecast_calibration(job)
        try:
            if max_scratch is not None:
                refuse_scratch(model.label, forecast, max_scratch)
            if settings.get("dry_run"):
                return plan_calibration(job, forecast)
            check_disk(forecast.scratch - folder_bytes(job.run.folder), job.run.folder.parent)
        except QuantcliError:
            # A dry run did not begin it: what is there is an interrupted run's.
            if not (settings.get("dry_run") or job.checkpoint.done):
                job.checkpoint.remove()
            raise
        how = "'quantcli calibrate' with the same options and --resume continues"
        return (yield from _run(job, how))


def merge_calibrations(
    paths: Sequence[Path], output: Path | None, *, legacy: bool = False, force: bool = False
) -> Events[CalibrationDone]:
    """Add up finished calibrations of one model."""
    path = output or Path(f"merged.calib.{_suffix(legacy)}")
    done = yield from take(merge(paths, path, legacy=legacy, force=force), CalibrationDone)
    yield from _note_few(done)
    return done


def calibrate_for(
    request: Request, model: Model, path: Path, *, collect: Sequence[str] = ()
) -> Events[Importance]:
    """Make the importance matrix ``path`` that a quantization will be given.

    What else it is to ``collect`` lies beside it.
    """
    texts = read_texts(list(request.texts))
    yield Note(f"calibrating {model.label} first; the importance matrix will be {path}")
    job = prepare(
        model, texts, path, chunks=request.chunks, collect=collect,
        max_memory=states_memory() if request.max_memory is None else 0,
        threads=request.threads or default_threads(),
        # An existing matrix that no interrupted run was making is nobody's to replace.
        resume=request.resume and was_interrupted(work_path(path, request.scratch)),
        force=request.force, device=request.device, scratch=request.scratch,
    )  # fmt: skip
    done = yield from _run(job, "the same command with --resume continues")
    return read_importance(done.paths[0])


def default_path(source: str, *, legacy: bool) -> Path:
    """``NAME.calib.gguf`` in the current folder, NAME being the repository's or folder's."""
    name = Path(source.rstrip("/").partition("@")[0]).resolve().name
    return Path(f"{name}.calib.{_suffix(legacy)}")


def _suffix(legacy: bool) -> str:
    return "dat" if legacy else "gguf"


def _run(job: CalibrationJob, how: str) -> Events[CalibrationDone]:
    """Run it; stopped early, the last note says what is kept, and ``how`` to go on."""
    try:
        done = yield from in_phase("calibrating", take(execute(job), CalibrationDone))
    except BaseException as stopped:
        if not job.checkpoint.done:
            job.checkpoint.remove()
        elif not isinstance(stopped, GeneratorExit):
            yield Note(f"{job.checkpoint.progress}; {how}", "warning")
        raise
    yield from _note_few(done)
    return done


def _note_few(done: CalibrationDone) -> Events[None]:
    """Say how many experts the text left without enough tokens."""
    few = [line for line in count_tokens(done.calibration) if line.few]
    if few:
        experts, unseen = sum(line.few for line in few), sum(line.unseen for line in few)
        yield Note(
            f"{experts} experts in {len(few)} tensors saw few tokens, {unseen} of them none; "
            "their weights are drawn to their layer's mean, and more text would help",
            "warning",
        )
