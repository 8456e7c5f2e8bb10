"""``quantcli export``: an artifact becomes another one, without a new quantization."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from quantcli.cli.options import Download, Threads, command, option
from quantcli.cli.output import Output
from quantcli.layouts import code_layouts

_RESULT = "What is written"
_CHECK = "Checking instead of writing"
_option = partial(option, panel=_RESULT)


@command
def export(
    out: Output,
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
            f"hf (a folder for transformers), {', '.join(code_layouts())} (the own codes of a GGUF "
            "or of another folder, for other runtimes), ollama (a Modelfile), imatrix or "
            "dat (an importance matrix in its GGUF or older form), card (a model card), report "
            "(a page and a card about several artifacts, with --eval and --against), hub "
            "(files and folders as they are into --repo).",
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
    repo: Annotated[
        str | None,
        _option(
            "--repo",
            metavar="ORG/NAME",
            help="With --to hub: the repository, created if it is not there. The token is that of "
            "'hf auth login', or HF_TOKEN.",
        ),
    ] = None,
    public: Annotated[
        bool,
        _option("--public", help="With --to hub: create the repository for everyone to see."),
    ] = False,
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
            help="With --verify and --to report: measure each tensor's error against this model; "
            "--verify also says whether the artifact was made from it.",
        ),
    ] = None,
    download: Download = False,
    threads: Threads = None,
) -> None:
    """Convert ARTIFACT to another format without quantizing anything again.

    Weights are read and written piece by piece, so the model need not fit into
    memory. Prints the path of what it made.

    For transformers:     quantcli export m-Q4_K_M.gguf --to hf

    Same codes for vLLM:  quantcli export ./my-model-mlx --to compressed-tensors

    At most 4 GB a file:  quantcli export m.gguf --to gguf --split-max-size 4G

    What a type cost:     quantcli export m.gguf --verify --against ./my-model
    """
    from quantcli.api.export import ExportResult
    from quantcli.api.export import export as run
    from quantcli.errors import SourceError
    from quantcli.report.units import duration_text, size_text

    kind = "verify" if verify else "export-plan" if dry_run else "export"

    def show(done: object) -> None:
        if isinstance(done, ExportResult) and out.json:
            out.document(kind, 1, done.document)
        elif isinstance(done, ExportResult):
            for table in done.tables:
                out.table(table)

    start = time.monotonic()
    try:
        done = run(
            artifacts, output, to=to, dtype=dtype, split_max_size=split_max_size, config=config,
            tokenizer=tokenizer, requantize=requantize, card=card, evaluation=evaluation,
            repo=repo, public=public, force=force, dry_run=dry_run, verify=verify, against=against,
            download=download, threads=threads, on_event=out.event,
        )  # fmt: skip
    except SourceError as error:
        show(error.result)
        raise
    show(done)
    if kind == "export":
        taken = duration_text(time.monotonic() - start)
        out.say(f"{done.summary}: {size_text(done.nbytes)} in {taken}")
        for made in (done.url,) if done.url else done.paths:
            out.result(made)
