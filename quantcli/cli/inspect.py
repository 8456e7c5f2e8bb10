"""``quantcli inspect``: what a model, a GGUF or an importance matrix holds, from headers alone."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from quantcli.cli.options import Threads, command, option
from quantcli.cli.output import Output

_SHOW = "What to show instead of the overview"
_CHOOSE = "Which tensors, and in which order"
_FIT = "Which type fits a machine"
_LIKE_A_TYPE = re.compile(r"[a-z]+\d+(_\w+)?", re.IGNORECASE)


def _cache_types(args: list[str]) -> list[str]:
    """``--kv q8_0`` as ``--kv-type q8_0``: the one without a value lists key-values."""
    if "--kv" not in args:
        return args
    from quantcli.fit.cache import CACHE_TYPES

    return [
        "--kv-type"
        if arg == "--kv" and (after.upper() in CACHE_TYPES or _LIKE_A_TYPE.fullmatch(after))
        else arg
        for arg, after in zip(args, [*args[1:], ""], strict=True)
    ]


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
    fit: Annotated[
        str | None,
        option(
            "--fit",
            metavar="SIZE",
            panel=_FIT,
            help="Tell which type to take for a machine with this much memory, such as 24G: "
            "weights, cache and buffers as llama.cpp allocates them.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        option(
            "--on",
            metavar="gpu|mac|cpu",
            panel=_FIT,
            help="Whose memory that is: a graphics card's (default), a Mac's or the computer's.",
        ),
    ] = None,
    ram: Annotated[
        str | None,
        option(
            "--ram",
            metavar="SIZE",
            panel=_FIT,
            help="The memory beside a graphics card, for layers that do not fit on it. "
            "Default: enough.",
        ),
    ] = None,
    ctx: Annotated[
        str | None,
        option(
            "--ctx", metavar="N", panel=_FIT, help="Tokens of context, such as 32k. Default: 8k."
        ),
    ] = None,
    kv_type: Annotated[
        str | None,
        option(
            "--kv-type",
            metavar="TYPE",
            panel=_FIT,
            help="Type of the cache of keys and values: f16 (default), q8_0, q4_0 ...",
        ),
    ] = None,
    flash_attn: Annotated[
        bool,
        option(
            "--flash-attn/--no-flash-attn",
            panel=_FIT,
            help="Whether llama.cpp runs with flash attention; without it buffers are larger. "
            "Default: with it.",
        ),
    ] = True,
    threads: Threads = None,
) -> None:
    """Show what MODEL holds and what it would weigh in each type.

    Reads headers alone, so the size of the model does not matter, and of a
    model on the Hub nothing else is fetched; only --stats needs the weights.

    The overview:               quantcli inspect ./my-model

    The type for my GPU:        quantcli inspect ./my-model --fit 24G --ctx 32k

    Its largest tensors:        quantcli inspect ./my-model --tensors --sort size

    Which layers are delicate:  quantcli inspect ./model --stats --sort kurtosis
    """
    from quantcli.api.inspect import inspect as look

    done = look(
        target, tensors=tensors, kv=kv, stats=stats, filter=pattern, sort=order, top=top,
        fit=fit, on=on, ram=ram, ctx=ctx, kv_type=kv_type, flash_attn=flash_attn,
        every=out.verbose, threads=threads, on_event=out.event,
    )  # fmt: skip
    if out.json:
        out.document("inspect", 1, done.document)
        return
    out.heading(done.found.title)
    for sentence in done.found.sentences:
        out.sentence(sentence)
    if done.found.sentences:
        out.line()
    for table in done.found.tables:
        out.table(table)


inspect.read_args = _cache_types  # type: ignore[attr-defined]
