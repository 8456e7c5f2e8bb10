"""``quantcli.calibrate``: importance matrices from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.api.calls import (
    Names,
    Watch,
    as_names,
    as_path,
    parse_bytes,
    refuse_below_one,
    takes_keywords,
)
from quantcli.api.to_store import into_store
from quantcli.errors import UsageError
from quantcli.events import Events, Show, drain
from quantcli.layerwise.require_torch import require_torch
from quantcli.types import Note

if TYPE_CHECKING:
    from quantcli.calibration import CalibrationDone
    from quantcli.statistics.importance_file import Calibration


@dataclass(frozen=True)
class CalibrateResult:
    """What `calibrate` wrote or read: its sums, and as ``document`` what ``--json`` prints.

    Of a dry run there are no sums, and ``nbytes`` is 0.
    """

    paths: tuple[Path, ...]
    nbytes: int
    calibration: Calibration | None
    document: Mapping[str, Any]
    notes: tuple[Note, ...]


@takes_keywords
@into_store
def calibrate(
    source: str | Path | None = None,
    data: Names = (),
    *,
    output: str | Path | None = None,
    field: str | None = None,
    ctx: int = 512,
    chunks: int | None = None,
    seed: int | None = None,
    collect: str | Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    scratch: str | Path | None = None,
    max_scratch: int | str | None = None,
    pre: str | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    legacy: bool = False,
    merge: Names = (),
    download: bool = False,
    stats: bool = False,
    threads: int | None = None,
    on_event: Show | None = None,
) -> CalibrateResult:
    """Run a model on the texts ``data`` and write the importance matrix of its weights.

    Without texts the built-in mix is taken; ``field`` is the key of a text in JSON lines. Windows
    have ``ctx`` tokens; the first ``chunks`` are run, or as many at random with ``seed``.
    ``collect`` names more statistics: abs_max, mean_abs, mean, min_max, histogram, kv_max, hessian.
    ``max_memory`` is that of hidden states, in bytes or as "4G". ``merge`` adds up finished
    calibrations instead, ``stats`` of a finished one only reads it. ``output`` defaults to
    NAME.calib.gguf in the current folder, ``legacy`` writes llama.cpp's older form. ``download``
    stores a model of the Hub first.
    """
    refuse_below_one(threads=threads, chunks=chunks)
    if merge and (source is not None or data):
        raise UsageError(
            "--merge adds up finished calibrations and runs no model",
            hint="calibrate first, then merge the files",
        )
    if source is None and not merge:
        raise UsageError("no MODEL is given", hint="see 'quantcli calibrate --help'")
    require_torch()
    from quantcli.calibration import load
    from quantcli.report.calibration_plan import plan_document
    from quantcli.report.calibrations import calibration_document
    from quantcli.run import calibrate as calibrating
    from quantcli.run.plan_calibration import CalibrationPlan

    watch = Watch(on_event)
    needs = [name for part in as_names(collect) for name in part.split(",")]
    path = as_path(output)
    if source is not None and stats and Path(source).is_file():
        paths: tuple[Path, ...] = ()
        found = load(Path(source))
    else:
        if source is None:
            run: Events[CalibrationDone | CalibrationPlan] = calibrating.merge_calibrations(
                [Path(file) for file in as_names(merge)], path, legacy=legacy, force=force
            )
        else:
            run = calibrating.calibrate(
                str(source), path, as_names(data), field=field, ctx=ctx,
                chunks=chunks, seed=seed, collect=needs, dtype=dtype, device=device,
                max_memory=parse_bytes(max_memory), pre=pre, resume=resume, force=force,
                legacy=legacy, threads=threads, download=download, on_fetch=watch,
                scratch=as_path(scratch), max_scratch=parse_bytes(max_scratch), dry_run=dry_run,
            )  # fmt: skip
        done = drain(run, watch)
        if isinstance(done, CalibrationPlan):
            document = plan_document(done)
            return CalibrateResult(done.paths, 0, None, document, tuple(watch.notes))
        paths, found = done.paths, done.calibration
    return CalibrateResult(
        paths,
        sum(each.stat().st_size for each in paths),
        found,
        calibration_document(found, list(map(str, paths)), stats=stats),
        tuple(watch.notes),
    )
