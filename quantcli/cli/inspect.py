"""``quantcli inspect``: what a model, a GGUF or an importance matrix holds, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.cli.options import Threads, command, option
from quantcli.cli.output import Output

if TYPE_CHECKING:
    pass

_SHOW = "What to show instead of the overview"
_CHOOSE = "Which tensors, and in which order"


@command
def inspect(
    out: Output,
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint folder, a Hub repository (org/name, org/name@revision or "
            "hf://...), a .gguf file or an importance matrix.",
            show_default=False,
        ),
    ],
    tensors: Annotated[
        bool, option("--tensors", help="List every tensor: shape, type and size.", panel=_SHOW)
    ] = False,
    kv: Annotated[
        bool, option("--kv", help="Show a GGUF's key-values, long ones whole.", panel=_SHOW)
    ] = False,
    stats: Annotated[
        bool,
        option(
            "--stats",
            help="Read all weights once and show their spread, outliers and the input channels "
            "that stand out: which layers are sensitive.",
            panel=_SHOW,
        ),
    ] = False,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--filter",
            metavar="REGEX",
            help="Only tensors in whose name (or GGUF name) this is found, such as 'attn_v'.",
            show_default=False,
            rich_help_panel=_CHOOSE,
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            "--sort",
            metavar="KEY",
            help="name, size, weights, dtype, shape or bits; with --stats also kurtosis, "
            "outliers, std, max or channel. Default: the model's own order.",
            show_default=False,
            rich_help_panel=_CHOOSE,
        ),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            "--top",
            min=1,
            metavar="N",
            help="How many channels that stand out --stats lists.",
            rich_help_panel=_CHOOSE,
        ),
    ] = 10,
    threads: Threads = None,
) -> None:
    """Show what MODEL holds and what it would weigh in each type.

    Reads headers alone, so the size of the model does not matter, and of a
    model on the Hub nothing else is fetched; only --stats needs the weights.

    The overview:               quantcli inspect ./my-model

    Its largest tensors:        quantcli inspect ./my-model --tensors --sort size

    Which layers are delicate:  quantcli inspect ./my-model --stats --sort kurtosis
    """
    from quantcli.api.inspect import inspect as look

    done = look(
        target, tensors=tensors, kv=kv, stats=stats, filter=pattern, sort=order, top=top,
        threads=threads, on_event=out.event,
    )  # fmt: skip
    if out.json:
        out.document("inspect", 1, done.document)
        return
    out.heading(done.found.title)
    for table in done.found.tables:
        out.table(table)
