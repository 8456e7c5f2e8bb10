"""``quantcli.evaluate``: perplexity and KL divergence from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.api.calls import (
    Names,
    Watch,
    as_names,
    as_path,
    parse_bytes,
    refuse_below_one,
    takes_keywords,
)
from quantcli.api.report import plan_report
from quantcli.artifacts.atomic import refuse_existing, write_file
from quantcli.artifacts.write import default_threads
from quantcli.errors import GateError, UsageError
from quantcli.evals.artifacts import AUTO, EvaluatedModel, check_folder, open_artifact
from quantcli.evals.bases.file import BaseFile
from quantcli.evals.gates import Gates, Verdict, check_gates, judge, needs_text, refuse_failures
from quantcli.evals.run import EvaluationDone, EvaluationJob, check_job
from quantcli.evals.run import evaluate as measure
from quantcli.evals.speed import SpeedDone, check_speed, measure_speed
from quantcli.evals.task_limits import judge_tasks, read_task_limits
from quantcli.evals.tasks import TaskDone, load_tasks, run_tasks
from quantcli.events import Show, drain, in_phase, take_all
from quantcli.layerwise.texts import read_texts
from quantcli.report.evaluations import evaluation_document, evaluation_tables
from quantcli.report.plot import Point, draw_plot
from quantcli.report.tables import Table
from quantcli.types import Note


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` measured: ``document`` holds the figures that ``--json`` prints.

    ``measured`` are the figures of each model on each text, ``verdicts`` those of the limits that
    were given, ``tables`` the same for people, ``paths`` the files that were written.
    """

    paths: tuple[Path, ...]
    measured: tuple[EvaluationDone, ...]
    verdicts: tuple[Verdict, ...]
    tables: tuple[Table, ...]
    document: Mapping[str, Any]
    notes: tuple[Note, ...]
    speeds: tuple[SpeedDone, ...] = ()
    tasks: tuple[TaskDone, ...] = ()


@takes_keywords
def evaluate(
    models: Names,
    data: Names = (),
    *,
    ctx: int | None = None,
    stride: int | None = None,
    chunks: int | None = None,
    field: str | None = None,
    engine: str | None = None,
    config: str | Path | None = None,
    reference: str | Path | None = None,
    base: str | Path | None = None,
    save_base: str | Path | None = None,
    top_k: int | None = None,
    force: bool = False,
    max_ppl: float | None = None,
    max_ppl_ratio: float | None = None,
    max_kld: float | None = None,
    max_kld99: float | None = None,
    max_kld999: float | None = None,
    max_rms_dp: float | None = None,
    min_top1: float | None = None,
    min_greedy: float | None = None,
    max_bpw: float | None = None,
    max_memory: int | str | None = None,
    min_prompt_speed: float | None = None,
    min_speed: float | None = None,
    greedy: int | None = None,
    floor: bool = False,
    tasks: Names = (),
    task_limit: int | None = None,
    min_task: Names = (),
    plot: str | Path | None = None,
    report: str | Path | None = None,
    speed: bool = False,
    download: bool = False,
    device: str | None = None,
    threads: int | None = None,
    on_event: Show | None = None,
) -> EvaluateResult:
    """Measure the perplexity of models on texts, and what sets them apart from a base.

    Windows have ``ctx`` tokens and begin every ``stride`` ones, ``chunks`` of them at most. The
    base is the model ``reference`` or the predictions in the file ``base``; ``save_base`` writes
    such a file, of the ``top_k`` likeliest tokens alone if given. ``engine`` is auto, llama.cpp or
    torch, ``config`` a folder with a GGUF's settings for the latter. ``greedy`` lets the reference
    continue prompts by so many tokens, and the models read them; ``floor`` runs the reference, a
    GGUF, in the other engine too, for what runtimes' rounding does. Where a limit (``max_...`` or
    ``min_...``, see `quantcli.evals.gates.Gates`) is not held, a `GateError` carries the result as
    ``result``. ``tasks`` are lm-eval's, by name or YAML file, of ``task_limit`` questions each at
    most, and ``min_task`` limits such as "arc_easy=0.7". ``speed`` measures GGUFs in llama.cpp as
    well; without ``data`` speeds and tasks are all that is measured.
    ``download`` stores models of the Hub first; a GGUF of the Hub always is, since llama.cpp opens
    the file itself.
    ``device`` is where torch runs models: auto (the default), cpu, cuda, cuda:1, xpu or mps.
    ``report`` is a folder for a page and a card about the models with these figures, and with their
    weights' errors against ``reference``.
    """
    refuse_below_one(threads=threads, chunks=chunks)
    watch = Watch(on_event)
    check_folder(as_path(config))
    texts = read_texts(as_names(data), field=field) if data else []
    options: dict[str, Any] = {
        "engine": engine or AUTO, "folder": as_path(config), "download": download,
    }  # fmt: skip
    gates = Gates(
        max_ppl=max_ppl, max_ppl_ratio=max_ppl_ratio, max_kld=max_kld, max_kld99=max_kld99,
        max_kld999=max_kld999, max_rms_dp=max_rms_dp, min_top1=min_top1, min_greedy=min_greedy,
        max_bpw=max_bpw, max_memory=parse_bytes(max_memory), min_prompt_speed=min_prompt_speed,
        min_speed=min_speed,
    )  # fmt: skip
    stored = BaseFile(Path(base)) if base is not None else None
    with ExitStack() as stack:
        origin = None
        if reference is not None:
            origin = open_artifact(str(reference), on_progress=watch, **options)
            stack.enter_context(origin.model)
            options["tokenizer"] = origin.checkpoint
        again = _floor(origin, options, watch, stack) if floor else None
        artifacts = []
        for name in as_names(models):
            artifacts.append(open_artifact(name, on_progress=watch, **options))
            stack.enter_context(artifacts[-1].model)
        job = EvaluationJob(
            artifacts, texts, context=ctx, stride=stride, chunks=chunks, reference=origin,
            base=stored, save=as_path(save_base), kept=top_k, force=force,
            threads=threads or default_threads(), device=device, greedy=greedy, floor=again,
        )  # fmt: skip
        timed = [*([origin] if origin is not None else []), *artifacts] if speed else []
        names = as_names(tasks)
        least = read_task_limits(as_names(min_task), task_limit, has_tasks=bool(names))
        scored = not (speed or names) or bool(texts) or stored is not None
        check_speed(timed)
        if scored:
            check_job(job)
            check_gates(gates, job, is_timed=bool(timed))
        else:
            check_gates(gates, job, is_timed=bool(timed))
            _refuse_without_text(gates, save_base, plot, greedy)
        asked = load_tasks(names, task_limit) if names else None
        if plot is not None:
            if not job.compares:
                raise UsageError("--plot draws the divergence from a base", hint="add --reference")
            refuse_existing([Path(plot)], force=force)
        page = plan_report(report, force=force, threads=threads)
        # Before any model is in memory here, and on processors that nothing else of this run uses.
        runs = measure_speed(timed, threads=job.threads)
        speeds = drain(in_phase("timing", take_all(runs, SpeedDone)), watch) if timed else []
        measured = []
        if scored:
            events = take_all(measure(job), EvaluationDone)
            measured = drain(in_phase("evaluating", events), watch)
        solved = []
        if asked is not None:
            everyone = [*([origin] if origin is not None else []), *artifacts]
            work = run_tasks(asked, everyone, context=ctx, threads=job.threads, device=device)
            solved = drain(in_phase("tasks", take_all(work, TaskDone)), watch)
        verdicts = judge(
            gates, [found for found in measured if not found.is_floor], artifacts, speeds
        )
        verdicts += judge_tasks(least, [done for done in solved if done.artifact is not origin])
        if plot is not None:
            _draw(Path(plot), measured, speeds, force=force)
        document = evaluation_document(job, measured, verdicts, speeds, solved)
        pages: tuple[Path, ...] = ()
        if page is not None:
            pages = page.write(
                as_names(models), document, None if origin is None else str(reference), watch
            )
        result = EvaluateResult(
            (*(Path(path) for path in (save_base, plot) if path is not None), *pages),
            tuple(measured),
            tuple(verdicts),
            tuple(evaluation_tables(job, measured, speeds, solved)),
            document,
            tuple(watch.notes),
            tuple(speeds),
            tuple(solved),
        )
    try:
        refuse_failures(verdicts)
    except GateError as error:
        error.result = result
        raise
    return result


def _floor(
    origin: EvaluatedModel | None, options: dict[str, Any], watch: Watch, stack: ExitStack
) -> EvaluatedModel:
    """The reference in the other engine; UsageError where it has none."""
    if origin is None:
        raise UsageError("--floor runs the reference once more", hint="add --reference MODEL")
    if not origin.model.from_gguf:
        raise UsageError(
            f"--floor runs a GGUF in llama.cpp and in torch, and {origin.label} is a checkpoint",
            hint="make one with --bits 16 and name it as --reference, or among the models: its "
            "divergence is the floor",
        )
    other = "torch" if origin.engine != "torch" else "llama.cpp"
    found = open_artifact(origin.label, on_progress=watch, **{**options, "engine": other})
    stack.enter_context(found.model)
    return found


def _refuse_without_text(
    gates: Gates, save: str | Path | None, plot: str | Path | None, greedy: int | None
) -> None:
    """UsageError for what a speed alone does not give."""
    files = {"--save-base": save, "--plot": plot, "--greedy": greedy}
    given = [name for name, value in files.items() if value is not None]
    for name in (*given, *(f"--{name}" for name in needs_text(gates))):
        raise UsageError(f"{name} needs a text to evaluate on", hint="add --data FILE")


def _draw(
    path: Path, measured: Sequence[EvaluationDone], speeds: Sequence[SpeedDone], *, force: bool
) -> None:
    written = {done.artifact.label: done.speed.generation_speed for done in speeds}
    points = [
        Point(
            found.text,
            Path(found.artifact.label).name,
            found.artifact.bits_per_weight,
            found.summary.against.mean.value,
            written.get(found.artifact.label),
        )
        for found in measured
        if found.summary.against is not None and not found.is_floor
    ]
    content = draw_plot(points).encode()
    write_file(path, content, force=force)
