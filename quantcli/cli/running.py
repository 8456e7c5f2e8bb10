"""A calibration's run as two commands show it: progress, warnings, and what an interrupt leaves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from quantcli.cli.options import thread_count

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from quantcli.calibration import Calibrated, CalibrationJob
    from quantcli.cli.output import Output
    from quantcli.model import Model
    from quantcli.types import Event


def default_memory() -> int:
    """Bytes of hidden states that may stay in memory: a quarter of what the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def calibrate_beside(
    out: Output,
    model: Model,
    data: list[str],
    output: Path,
    *,
    chunks: int | None,
    force: bool,
    threads: int | None,
) -> Path:
    """Calibrate for a quantization that will be ``output``; the matrix's path, beside it."""
    from quantcli.layerwise.require_torch import require_torch

    require_torch()
    from quantcli.calibration import prepare
    from quantcli.layerwise.texts import read_texts

    texts = read_texts(data)
    path = output.with_name(f"{output.name.removesuffix('.gguf')}.calib.gguf")
    out.say(f"calibrating {model.label} first; the importance matrix will be {path}")
    job = prepare(
        model,
        texts,
        path,
        chunks=chunks,
        max_memory=default_memory(),
        threads=thread_count(threads),
        force=force,
    )
    finished = run_job(out, job)
    warn_of_few(out, finished)
    return finished.paths[0]


def run_job(out: Output, job: CalibrationJob) -> Calibrated:
    """Run it with progress; when it ends early, say what is kept and how to go on."""
    from quantcli.calibration import execute

    with out.phase("calibrating"):
        try:
            return consume(out, execute(job))
        except BaseException:
            if job.checkpoint.done:
                out.close()
                out.warn(
                    f"{job.checkpoint.done} layers are done and kept in {job.run.folder}; "
                    "'quantcli calibrate' with the same options and --resume continues"
                )
            else:
                job.checkpoint.remove()
            raise


def consume(out: Output, events: Iterable[Event]) -> Calibrated:
    """Show the events up to the result."""
    from quantcli.calibration import Calibrated

    for event in events:
        if isinstance(event, Calibrated):
            return event
        out.event(event)
    raise RuntimeError("a calibration ended without a result")


def warn_of_few(out: Output, finished: Calibrated) -> None:
    """Say how many experts the text left without enough tokens."""
    from quantcli.statistics.coverage import coverage

    few = [line for line in coverage(finished.calibration) if line.few]
    if few:
        experts, unseen = sum(line.few for line in few), sum(line.unseen for line in few)
        out.warn(
            f"{experts} experts in {len(few)} tensors saw few tokens, {unseen} of them none; "
            "their weights are drawn to their layer's mean, and more text would help"
        )
