"""``quantcli eval-ppl``: what a quantization costs, in perplexity and KL divergence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.cli.habits import read_text_args
from quantcli.cli.options import Device, Download, Threads, command, option
from quantcli.cli.output import Output

if TYPE_CHECKING:
    pass

_TEXT = "The text, and how it is cut"
_BASE = "The base to compare with"
_MORE = "The engine, and what else is measured"
_GATES = "Limits (exit code 3 if one is exceeded)"


@command
def eval_ppl(
    out: Output,
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
            help="A text, JSON lines, '-' for standard input, or NAME:CONFIG:SPLIT of a data set "
            "(pip install datasets). Repeatable; each is reported.",
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
            panel=_MORE,
            help="auto, llama.cpp or torch. auto takes llama.cpp for a GGUF, if it is installed.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        option(
            "--config",
            metavar="FOLDER",
            panel=_MORE,
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
    max_ppl_ratio: Annotated[
        float | None,
        option(
            "--max-ppl-ratio",
            metavar="X",
            panel=_GATES,
            help="Perplexity divided by the base's, at most, such as 1.02.",
        ),
    ] = None,
    max_kld: Annotated[
        float | None,
        option("--max-kld", metavar="X", panel=_GATES, help="Mean KL divergence, at most."),
    ] = None,
    max_kld99: Annotated[
        float | None,
        option(
            "--max-kld99",
            metavar="X",
            panel=_GATES,
            help="KL divergence that 99 % of the positions stay below, at most.",
        ),
    ] = None,
    max_kld999: Annotated[
        float | None,
        option(
            "--max-kld999",
            metavar="X",
            panel=_GATES,
            help="KL divergence that 99.9 % of the positions stay below, at most.",
        ),
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
    max_rms_dp: Annotated[
        float | None,
        option(
            "--max-rms-dp",
            metavar="X",
            panel=_GATES,
            help="Root mean square change of the true token's probability, at most, such as 0.05.",
        ),
    ] = None,
    min_greedy: Annotated[
        float | None,
        option(
            "--min-greedy",
            metavar="X",
            panel=_GATES,
            help="Greedy agreement, at least, such as 0.9; needs --greedy.",
        ),
    ] = None,
    max_bpw: Annotated[
        float | None,
        option("--max-bpw", metavar="X", panel=_GATES, help="Bits per weight, at most."),
    ] = None,
    max_memory: Annotated[
        str | None,
        option(
            "--max-memory",
            metavar="SIZE",
            panel=_GATES,
            help="Memory in llama.cpp, at most, such as 6G; needs --speed.",
        ),
    ] = None,
    min_prompt_speed: Annotated[
        float | None,
        option(
            "--min-prompt-speed",
            metavar="X",
            panel=_GATES,
            help="Tokens read per second, at least; needs --speed.",
        ),
    ] = None,
    min_speed: Annotated[
        float | None,
        option(
            "--min-speed",
            metavar="X",
            panel=_GATES,
            help="Tokens written per second, at least; needs --speed.",
        ),
    ] = None,
    greedy: Annotated[
        int | None,
        option(
            "--greedy",
            metavar="N",
            panel=_BASE,
            help="Let the reference write N tokens after the first half of up to 16 windows, and "
            "show how often the models would have written the same.",
        ),
    ] = None,
    floor: Annotated[
        bool,
        option(
            "--floor",
            panel=_BASE,
            help="Run the reference, a GGUF, in the other engine too: what it differs from itself "
            "by is the floor below which a divergence says nothing of weights.",
        ),
    ] = False,
    tasks: Annotated[
        list[str] | None,
        option(
            "--tasks",
            metavar="NAME,...",
            panel=_MORE,
            help="Run these tasks of lm-eval too (pip install lm_eval), by name or YAML file, such "
            "as arc_easy,hellaswag. Without --data nothing else is measured.",
        ),
    ] = None,
    task_limit: Annotated[
        int | None,
        option("--task-limit", metavar="N", panel=_MORE, help="At most N questions of each task."),
    ] = None,
    min_task: Annotated[
        list[str] | None,
        option(
            "--min-task",
            metavar="NAME=X",
            panel=_GATES,
            help="A task's first metric, at least, such as arc_easy=0.7. Repeatable.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        option(
            "--plot",
            metavar="FILE.svg",
            panel=_MORE,
            help="Draw KL divergence against bits per weight.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        option(
            "--report",
            metavar="FOLDER",
            panel=_MORE,
            help="Write a page with these figures into this folder (report.html), and a card for "
            "the models' repository (README.md).",
        ),
    ] = None,
    speed: Annotated[
        bool,
        option(
            "--speed",
            panel=_MORE,
            help="Time GGUFs in llama.cpp too, as llama-bench does: tokens read and written per "
            "second, and memory. Without --data nothing else is measured.",
        ),
    ] = False,
    download: Download = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Measure perplexity, and what a quantization changed.

    Perplexity and KL divergence are defined as in llama-perplexity. The
    base runs beside the models, so no file of its predictions is needed.

    A perplexity:      quantcli eval-ppl m.gguf --data t.txt

    What 4 bits cost:  quantcli eval-ppl q4.gguf --reference m.gguf --data t.txt

    How fast it is:    quantcli eval-ppl m.gguf q4.gguf --speed

    A gate for CI:     quantcli eval-ppl m.gguf --data t.txt --max-ppl 9.5 --json
    """
    from quantcli.api.evaluate import EvaluateResult, evaluate
    from quantcli.cli.ranked import joined_ranks
    from quantcli.errors import GateError

    def show(done: object) -> None:
        if isinstance(done, EvaluateResult) and out.json:
            out.document("eval-ppl", 1, done.document)
        elif isinstance(done, EvaluateResult):
            for table in done.tables:
                out.table(table)

    try:
        with joined_ranks(
            out, base=base, save_base=save_base, greedy=greedy, task=tasks, speed=speed,
            plot=plot, report=report,
        ):  # fmt: skip
            done = evaluate(
                artifacts, data or (), ctx=ctx, stride=stride, chunks=chunks, field=field,
                engine=engine, config=config, reference=reference, base=base, save_base=save_base,
                top_k=top_k, force=force, max_ppl=max_ppl, max_ppl_ratio=max_ppl_ratio,
                max_kld=max_kld, max_kld99=max_kld99, max_kld999=max_kld999, max_rms_dp=max_rms_dp,
                min_top1=min_top1, min_greedy=min_greedy, max_bpw=max_bpw, max_memory=max_memory,
                min_prompt_speed=min_prompt_speed, min_speed=min_speed, greedy=greedy, floor=floor,
                tasks=tasks or (), task_limit=task_limit, min_task=min_task or (),
                plot=plot, report=report, speed=speed, device=device,
                download=download, threads=threads, on_event=out.event,
            )  # fmt: skip
    except GateError as error:
        show(error.result)
        raise
    show(done)


eval_ppl.read_args = read_text_args  # type: ignore[attr-defined]
