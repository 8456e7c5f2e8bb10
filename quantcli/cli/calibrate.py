"""``quantcli calibrate``: a text goes through the model once, and what each weight saw is kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from quantcli.cli.habits import read_text_args
from quantcli.cli.options import Device, Download, Threads, command, option
from quantcli.cli.output import Output

_TEXT = "The text"
_RUN = "How the model is run"
_OUTPUT = "The files that are written"
_option = partial(option, panel=_TEXT)


@command
def calibrate(
    out: Output,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A checkpoint folder or a Hub repository (org/name, org/name@revision or "
            "hf://...); with --stats also a finished calibration, with --merge none.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        _option(
            "--data",
            "-d",
            metavar="FILE[:WEIGHT]",
            help="Text, JSON lines (.jsonl), '-' for standard input, or NAME:CONFIG:SPLIT of a "
            "data set (pip install datasets). Repeatable; with weights, "
            "windows are taken in that proportion. Default: a built-in mix of prose, code, "
            "conversations and other languages.",
        ),
    ] = None,
    field: Annotated[
        str | None,
        _option("--field", metavar="KEY", help="The text's key in JSON lines. Default: text."),
    ] = None,
    ctx: Annotated[
        int, _option("--ctx", "-c", metavar="N", help="Tokens of a window. Default: 512.")
    ] = 512,
    chunks: Annotated[
        int | None,
        _option(
            "--chunks", metavar="N", min=1, help="Use the first N windows. Default: all of them."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        _option("--seed", metavar="N", help="Choose the windows of --chunks at random instead."),
    ] = None,
    collect: Annotated[
        list[str] | None,
        _option(
            "--collect",
            metavar="WHAT",
            panel=_RUN,
            help="Collect this too: abs_max, mean_abs (each channel's "
            "largest and mean absolute value), mean (its mean, for --correct-bias), min_max (its "
            "least and largest value, for --scheme FP8 and other static scales), histogram (how "
            "its values are spread, for static int8), kv_max (the largest key and value, for "
            "--kv-cache) or hessian (X X^T). Repeatable, or with commas.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        _option(
            "--dtype",
            metavar="NAME",
            panel=_RUN,
            help="Precision of the matrix products: float32 or bfloat16. Default: bfloat16 where "
            "the weights are stored so and the processor has it, else float32.",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        _option(
            "--max-memory",
            metavar="SIZE",
            panel=_RUN,
            help="Memory for hidden states, such as 4G; larger ones are kept in a file. "
            "Default: a quarter of this machine's memory.",
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        _option(
            "--scratch",
            metavar="DIR",
            panel=_RUN,
            help="Keep the run's own files in this folder until the result is whole. Default: "
            "beside the result. --resume finds them with the same DIR.",
        ),
    ] = None,
    max_scratch: Annotated[
        str | None,
        _option(
            "--max-scratch",
            metavar="SIZE",
            panel=_RUN,
            help="Refuse before the work if these files would take more than SIZE, such as 40G.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        _option(
            "--dry-run",
            panel=_OUTPUT,
            help="Print what memory, scratch disk and time it will take, and write nothing.",
        ),
    ] = False,
    pre: Annotated[
        str | None,
        _option(
            "--pre",
            metavar="NAME",
            panel=_RUN,
            help="Name the pre-tokenizer, where it is not recognised.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        _option("--resume", help="Continue an interrupted run of the same command.", panel=_RUN),
    ] = False,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "-o",
            metavar="FILE",
            panel=_OUTPUT,
            help="Default: MODEL.calib.gguf in this folder.",
        ),
    ] = None,
    force: Annotated[
        bool,
        _option("--force", "-f", help="Replace an existing file or checkpoint.", panel=_OUTPUT),
    ] = False,
    legacy: Annotated[
        bool, _option("--legacy", help="Write llama.cpp's older .dat form.", panel=_OUTPUT)
    ] = False,
    merge: Annotated[
        list[Path] | None,
        _option(
            "--merge",
            metavar="FILE",
            panel=_OUTPUT,
            help="Add up finished calibrations of one model instead of running it. Repeatable.",
        ),
    ] = None,
    stats: Annotated[
        bool,
        _option("--stats", help="Print statistics of every tensor's input.", panel=_OUTPUT),
    ] = False,
    download: Download = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Find out which weights of MODEL matter, for 'quantcli quantize --imatrix'.

    A text goes through the model layer by layer, so that one layer's weights
    are in memory at a time. The result is an importance matrix in llama.cpp's
    own form. Prints its path.

    With a text of your own:    quantcli calibrate ./my-model --data text.txt

    An interrupted run:         quantcli calibrate ./model --data my.txt --resume

    What a calibration tells:   quantcli calibrate my-model.calib.gguf --stats
    """
    from quantcli.api.calibrate import calibrate as run
    from quantcli.cli.ranked import joined_ranks

    with joined_ranks(out, merge=merge, dry_run=dry_run):
        done = run(
            model,
            data or (),
            field=field,
            ctx=ctx,
            chunks=chunks,
            seed=seed,
            collect=collect or (),
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            scratch=scratch,
            max_scratch=max_scratch,
            dry_run=dry_run,
            pre=pre,
            resume=resume,
            output=output,
            force=force,
            legacy=legacy,
            merge=merge or (),
            stats=stats,
            download=download,
            threads=threads,
            on_event=out.event,
        )
    if out.json:
        out.document("calibration" if done.calibration else "calibration-plan", 1, done.document)
        return
    if done.calibration is None:
        from quantcli.report.calibration_plan import plan_table

        out.table(plan_table(dict(done.document)))
        return
    if stats and not out.quiet:
        from quantcli.report.calibrations import coverage_table, stats_table

        out.table(coverage_table(done.calibration))
        out.table(stats_table(done.calibration))
    for path in done.paths:
        out.result(path)


calibrate.read_args = read_text_args  # type: ignore[attr-defined]
