"""``quantcli eval-ppl``: what a quantization costs, in perplexity and KL divergence."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.cli.options import (
    Debug,
    Json,
    Quiet,
    Threads,
    Verbose,
    open_output,
    option,
    thread_count,
)
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantcli.cli.output import Output
    from quantcli.evals.gates import Gates
    from quantcli.evals.run import Job, Measured

_TEXT = "The text, and how it is cut"
_BASE = "The base to compare with"
_GATES = "Limits (exit code 3 if one is exceeded)"


def eval_ppl(
    context: typer.Context,
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="GGUF files, checkpoint folders or Hub repositories; several make one table.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str] | None,
        option(
            "--data",
            metavar="FILE",
            panel=_TEXT,
            help="A text, JSON lines or '-' for standard input. Repeatable; each is reported.",
        ),
    ] = None,
    ctx: Annotated[
        int | None,
        option("--ctx", metavar="N", panel=_TEXT, help="Tokens of a window. Default: 512."),
    ] = None,
    stride: Annotated[
        int | None,
        option(
            "--stride",
            metavar="N",
            panel=_TEXT,
            help="Let windows begin every N tokens and score each token once. Default: windows "
            "side by side, of which the second half is scored, as llama-perplexity does.",
        ),
    ] = None,
    chunks: Annotated[
        int | None,
        typer.Option(
            "--chunks",
            min=1,
            metavar="N",
            help="At most N windows of each text.",
            show_default=False,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    field: Annotated[
        str | None,
        option(
            "--field",
            metavar="KEY",
            panel=_TEXT,
            help="The key of a text in JSON lines. Default: text.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        option(
            "--engine",
            metavar="NAME",
            help="auto, llama.cpp or torch. auto takes llama.cpp for a GGUF, if it is installed.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        option(
            "--config",
            metavar="FOLDER",
            help="Where torch finds a GGUF's config.json and tokenizer.json. Default: what the "
            "GGUF itself says.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        option(
            "--reference",
            metavar="MODEL",
            panel=_BASE,
            help="The model before quantization, run alongside window by window.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        option(
            "--base",
            metavar="FILE",
            panel=_BASE,
            help="Predictions that --save-base or llama-perplexity saved.",
        ),
    ] = None,
    save_base: Annotated[
        Path | None,
        option(
            "--save-base",
            metavar="FILE",
            panel=_BASE,
            help="Save the reference's predictions, or MODEL's, in llama.cpp's format.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        option(
            "--top-k",
            metavar="K",
            panel=_BASE,
            help="Save only the K likeliest tokens of each position: a much smaller file, which "
            "gives a lower bound of the divergence.",
        ),
    ] = None,
    force: Annotated[
        bool, option("--force", "-f", help="Replace an existing file.", panel=_BASE)
    ] = False,
    max_ppl: Annotated[
        float | None,
        option("--max-ppl", metavar="X", panel=_GATES, help="Perplexity, at most."),
    ] = None,
    max_kld: Annotated[
        float | None,
        option("--max-kld", metavar="X", panel=_GATES, help="Mean KL divergence, at most."),
    ] = None,
    min_top1: Annotated[
        float | None,
        option(
            "--min-top1",
            metavar="X",
            panel=_GATES,
            help="Share of positions with the base's top token, at least, such as 0.95.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        option("--plot", metavar="FILE.svg", help="Draw KL divergence against bits per weight."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, and what a quantization changed.

    Perplexity and KL divergence are defined as in llama-perplexity. The
    base runs beside the models, so no file of its predictions is needed.

    A perplexity:               quantcli eval-ppl m.gguf --data text.txt

    What 4 bits cost:           quantcli eval-ppl q4.gguf --reference m.gguf --data text.txt

    A gate for CI:              quantcli eval-ppl m.gguf --data text.txt --max-ppl 9.5 --json
    """
    out = open_output(context, quiet=quiet, verbose=verbose, debug=debug, json=json)

    from quantcli.artifacts.atomic import refuse_existing
    from quantcli.evals.artifacts import AUTO, check_folder, open_artifact
    from quantcli.evals.bases.file import BaseFile
    from quantcli.evals.gates import Gates, check_gates
    from quantcli.evals.run import Job, check_job
    from quantcli.layerwise.texts import read_texts

    check_folder(config)
    texts = read_texts(data, field=field) if data else []
    stored = BaseFile(base) if base else None
    wanted = engine or AUTO
    gates = Gates(max_ppl, max_kld, min_top1)
    with ExitStack() as stack:
        origin = None
        if reference is not None:
            origin = open_artifact(reference, engine=wanted, folder=config, on_progress=out.event)
            stack.enter_context(origin.model)
        found = []
        for target in artifacts:
            artifact = open_artifact(
                target,
                engine=wanted,
                folder=config,
                tokenizer=origin.checkpoint if origin else None,
                on_progress=out.event,
            )
            stack.enter_context(artifact.model)
            found.append(artifact)
        job = Job(
            found, texts,
            context=ctx, stride=stride, chunks=chunks, reference=origin, base=stored,
            save=save_base, kept=top_k, force=force, threads=thread_count(threads),
        )  # fmt: skip
        check_job(job)
        check_gates(gates, job)
        if plot is not None:
            if not job.compares:
                raise UsageError("--plot draws the divergence from a base", hint="add --reference")
            refuse_existing([plot], force=force)
        _run(out, job, gates, plot)


def _run(out: Output, job: Job, gates: Gates, plot: Path | None) -> None:
    from quantcli.evals.gates import judge, refuse_failures
    from quantcli.evals.run import Measured, evaluate
    from quantcli.report.evaluations import evaluation_document, evaluation_tables

    results: list[Measured] = []
    with out.phase("evaluating"):
        for event in evaluate(job):
            if isinstance(event, Measured):
                results.append(event)
            else:
                out.event(event)
    verdicts = judge(gates, results)
    if out.json:
        out.document("eval-ppl", 1, evaluation_document(job, results, verdicts))
    for table in evaluation_tables(job, results):
        out.table(table)
    if plot is not None:
        _draw(plot, results, force=job.force)
    refuse_failures(verdicts)


def _draw(path: Path, results: Sequence[Measured], *, force: bool) -> None:
    from quantcli.artifacts.atomic import AtomicFiles
    from quantcli.report.plot import Point, draw_plot

    points = [
        Point(
            found.text,
            Path(found.artifact.label).name,
            found.artifact.bits_per_weight,
            found.summary.against.mean.value,
        )
        for found in results
        if found.summary.against is not None
    ]
    content = draw_plot(points).encode()
    with AtomicFiles({path: len(content)}, force=force) as files:
        files.write(path, 0, content)
        files.publish()
