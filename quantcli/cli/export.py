"""``quantcli export``: an artifact becomes another one, without a new quantization."""

from __future__ import annotations

import time
from functools import partial
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
    from quantcli.cli.output import Output
    from quantcli.exports.outcome import Exported
    from quantcli.exports.targets import Prepared, Wish

_RESULT = "What is written"
_CHECK = "Checking instead of writing"


_option = partial(option, panel=_RESULT)


def export(
    context: typer.Context,
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT...",
            help="A GGUF (any of its shards, or all), a checkpoint folder or repository, or an "
            "importance matrix.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str | None,
        _option(
            "--to",
            metavar="FORMAT",
            help="gguf (a checkpoint in its own floats or codes; a GGUF split, merged or decoded), "
            "hf (a folder for transformers), compressed-tensors, gptq, gptq-v2, awq or mlx (a "
            "GGUF's own codes in a folder for other runtimes), ollama (a Modelfile), imatrix or "
            "dat (an importance matrix in its GGUF or older form), card (a model card).",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "-o",
            metavar="PATH",
            help="The file or folder. Default: named after the artifact, in this folder.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        _option(
            "--dtype",
            metavar="NAME",
            help="f32, f16 or bf16 for the weights. Default: what loses nothing of floats; for "
            "quantized weights f16, or bf16 where a model overflows that.",
        ),
    ] = None,
    split_max_size: Annotated[
        str | None,
        _option(
            "--split-max-size",
            "--max-shard-size",
            metavar="SIZE",
            help="Split into files of at most SIZE, such as 4G or 500M. A folder's default: 5G.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        _option(
            "--config",
            metavar="FOLDER",
            help="Take config.json from this folder instead of rebuilding it.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        _option(
            "--tokenizer",
            metavar="FOLDER",
            help="Take the tokenizer's files from this folder instead of rebuilding them.",
        ),
    ] = None,
    requantize: Annotated[
        bool,
        _option(
            "--requantize",
            help="Round a second time what the other format does not hold bit for bit; this "
            "costs quality.",
        ),
    ] = False,
    card: Annotated[
        bool, _option("--card", help="Write a model card next to the GGUF, NAME.md.")
    ] = False,
    evaluation: Annotated[
        Path | None,
        _option(
            "--eval",
            metavar="FILE",
            help="Put the results that 'eval-ppl --json' printed into the model card.",
        ),
    ] = None,
    force: Annotated[
        bool, _option("--force", "-f", help="Replace an existing file or folder.")
    ] = False,
    dry_run: Annotated[
        bool, _option("--dry-run", help="Print what would be written and write nothing.")
    ] = False,
    verify: Annotated[
        bool,
        _option(
            "--verify",
            help="Write nothing; decode every weight and check digests, sizes and that all "
            "scales are finite.",
            panel=_CHECK,
        ),
    ] = False,
    against: Annotated[
        str | None,
        _option(
            "--against",
            metavar="MODEL",
            panel=_CHECK,
            help="With --verify: measure each tensor's error against this model, and report "
            "whether the artifact was made from it.",
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Convert ARTIFACT to another format without quantizing anything again.

    Weights are read and written piece by piece, so the model need not fit into
    memory. Prints the path of what it made.

    A folder for transformers:  quantcli export m-Q4_K_M.gguf --to hf

    In files of at most 4 GB:   quantcli export m.gguf --to gguf --split-max-size 4G

    What a type cost:           quantcli export m-Q4_K_M.gguf --verify --against ./my-model
    """
    out = open_output(context, quiet=quiet, verbose=verbose, debug=debug, json=json)
    if verify:
        if to is not None:
            raise UsageError("--verify writes nothing, and --to does", hint="give one of them")
        _verify(out, artifacts, against, thread_count(threads))
        return
    if against is not None:
        raise UsageError("--against measures a difference", hint="add --verify")
    if to is None:
        from quantcli.exports.targets import TARGETS

        raise UsageError(
            "--to FORMAT is missing",
            hint=f"one of {', '.join(TARGETS)}; or --verify",
        )
    from quantcli.exports.job import make_wish

    wish = make_wish(
        to,
        output=output,
        dtype=dtype,
        split_max_size=split_max_size,
        config=config,
        tokenizer=tokenizer,
        card=card,
        requantize=requantize,
        evaluation=evaluation,
        force=force,
        check=not dry_run,
        threads=thread_count(threads),
    )
    _run(out, artifacts, to, wish, dry_run=dry_run)


def _run(out: Output, artifacts: list[str], to: str, wish: Wish, *, dry_run: bool) -> None:
    from quantcli.exports.job import open_export
    from quantcli.exports.outcome import Exported
    from quantcli.report.units import duration_text, size_text

    with open_export(artifacts, to, wish, on_progress=out.event) as prepared:
        if dry_run:
            _show_plan(out, to, prepared)
            return
        start = time.monotonic()
        done: Exported | None = None
        with out.phase("exporting"):
            for event in prepared.run():
                if isinstance(event, Exported):
                    done = event
                else:
                    out.event(event)
    if done is None:
        raise RuntimeError("an export ended without a result")
    out.say(
        f"{prepared.sentence}: {size_text(done.nbytes)} in "
        f"{duration_text(time.monotonic() - start)}"
    )
    if out.json:
        paths = [str(path) for path in done.paths]
        out.document("export", 1, {"to": to, "paths": paths, "bytes": done.nbytes})
        return
    for path in done.paths:
        out.result(path)


def _show_plan(out: Output, to: str, prepared: Prepared) -> None:
    from quantcli.plan.budget import free_disk
    from quantcli.report.tables import facts
    from quantcli.report.units import size_text

    free = free_disk(prepared.paths[0].parent)
    if out.json:
        paths = [str(path) for path in prepared.paths]
        fields = {"to": to, "paths": paths, "bytes": prepared.nbytes, "free_disk_bytes": free}
        out.document("export-plan", 1, fields)
        return
    rows = [("output", str(path)) for path in prepared.paths]
    rows.append(("what", prepared.sentence))
    if prepared.nbytes:
        rows.append(("size", f"{size_text(prepared.nbytes)} ({prepared.nbytes:,} bytes)"))
    rows.append(("free disk", size_text(free)))
    out.table(facts(rows))


def _verify(out: Output, artifacts: list[str], against: str | None, threads: int) -> None:
    from contextlib import ExitStack

    from quantcli.errors import SourceError
    from quantcli.exports.verdicts import verdict_document, verdict_tables
    from quantcli.exports.verify import Verified, verify
    from quantcli.model import open_model

    if len(artifacts) > 1:
        raise UsageError("--verify takes one artifact", hint="of a split GGUF, any of its shards")
    with ExitStack() as stack:
        model = stack.enter_context(open_model(artifacts[0], on_progress=out.event))
        source = None
        if against is not None:
            source = stack.enter_context(
                open_model(against, vocabulary=False, on_progress=out.event)
            )
        verdict: Verified | None = None
        with out.phase("verifying"):
            for event in verify(model, source, threads=threads):
                if isinstance(event, Verified):
                    verdict = event
                else:
                    out.event(event)
    if verdict is None:
        raise RuntimeError("a verification ended without a verdict")
    if out.json:
        out.document("verify", 1, verdict_document(artifacts[0], against, verdict))
    for table in verdict_tables(artifacts[0], against, verdict):
        out.table(table)
    if verdict.problems:
        first, *more = verdict.problems
        raise SourceError(first + (f" (and {len(more)} more)" if more else ""))
