"""``quantcli inspect``: what a model, a GGUF or an importance matrix holds, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.cli.options import Debug, Json, Quiet, Threads, Verbose, open_output, option
from quantcli.errors import UsageError

if TYPE_CHECKING:
    import re
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from quantcli.cli.output import Output
    from quantcli.report.inspection import Subject
    from quantcli.report.stats import WeightStats
    from quantcli.report.weights import WeightSource
    from quantcli.sources.resolve import Resolved

_SHOW = "What to show instead of the overview"
_CHOOSE = "Which tensors, and in which order"


def inspect(
    context: typer.Context,
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
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show what MODEL holds and what it would weigh in each type.

    Reads headers alone, so the size of the model does not matter, and of a
    model on the Hub nothing else is fetched; only --stats needs the weights.

    The overview:               quantcli inspect ./my-model

    Its largest tensors:        quantcli inspect ./my-model --tensors --sort size

    Which layers are delicate:  quantcli inspect ./my-model --stats --sort kurtosis
    """
    out = open_output(context, quiet=quiet, verbose=verbose, debug=debug, json=json)

    from quantcli.report.listing import check_order, compile_filter

    check_order(order, stats=stats)
    wanted = compile_filter(pattern)
    found = _find(out, target, stats)
    if found.kind == "imatrix":
        _refuse(
            {"--tensors": tensors, "--kv": kv, "--stats": stats, "--sort": order is not None},
            "an importance matrix",
        )
        _show_importance(out, found.path, wanted)
        return
    if kv and found.kind != "gguf":
        raise UsageError(
            "--kv shows the key-values of a GGUF, and this is a checkpoint",
            hint=f"its settings are in {found.path / 'config.json'}",
        )
    from quantcli.report.opening import open_subject

    with open_subject(found, target) as subject:
        _show_model(
            out, subject, wanted, order,
            tensors=tensors, kv=kv, stats=stats, top=top, threads=threads,
        )  # fmt: skip


def _find(out: Output, target: str, stats: bool) -> Resolved:
    """The files behind ``target``; of the Hub, weights are fetched for statistics alone."""
    from quantcli.sources.resolve import resolve

    with out.phase("fetching"):
        found = resolve(target, on_progress=out.event, weights=stats)
    if found.is_remote:
        out.say("reading the headers on the Hub; the weights stay there")
    return found


def _refuse(switches: Mapping[str, bool], what: str) -> None:
    for name, given in switches.items():
        if given:
            raise UsageError(f"{name} does not apply to {what}", hint="leave it out")


def _show_model(
    out: Output,
    subject: Subject,
    pattern: re.Pattern[str] | None,
    order: str | None,
    *,
    tensors: bool,
    kv: bool,
    stats: bool,
    top: int,
    threads: int | None,
) -> None:
    from quantcli.report import document, listing, overview

    for note in subject.notes:
        out.warn(note)
    chosen = listing.choose_tensors(subject, pattern, order)
    if pattern is not None and not chosen:
        raise UsageError(
            f"--filter {pattern.pattern!r} is found in no tensor's name",
            hint="--tensors lists the names",
        )
    sources: Sequence[WeightSource] = ()
    pairs: list[tuple[str, WeightStats]] = []
    if stats:
        sources = listing.choose_sources(subject, chosen, order)
        pairs = listing.sort_stats(_measure(out, subject, sources, threads), order)
    if out.json:
        fields = document.model_document(subject, chosen, full_values=kv)
        if stats:
            fields["stats"] = document.stats_document(sources, pairs, top)
        out.document("inspect", 1, fields)
        return
    out.heading(subject.label)
    if tensors or ((pattern or order) and not stats):
        out.table(listing.tensor_table(subject, chosen))
    if kv:
        out.table(listing.key_value_table(subject.metadata, full=True))
    if stats:
        out.table(listing.stats_table(sources, pairs))
        out.table(listing.channel_table(pairs, top))
    if not (tensors or kv or stats or pattern or order):
        for table in overview.overview_tables(subject):
            out.table(table)
        out.table(listing.key_value_table(subject.metadata, full=False))


def _measure(
    out: Output, subject: Subject, sources: Sequence[WeightSource], threads: int | None
) -> Mapping[str, WeightStats]:
    from quantcli.cli.options import thread_count
    from quantcli.errors import SourceError
    from quantcli.report.weights import Measured, measure_weights

    if not sources:
        raise SourceError(f"{subject.label}: no tensor among these can be read as numbers")
    result: Mapping[str, WeightStats] = {}
    with out.phase("measuring"):
        for event in measure_weights(sources, thread_count(threads)):
            if isinstance(event, Measured):
                result = event.stats
            else:
                out.event(event)
    broken = [name for name, found in result.items() if found.nonfinite]
    if broken:
        out.warn(
            f"NaN or infinities in {len(broken)} of {len(result)} tensors are left out of the "
            f"numbers: {', '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}"
        )
    return result


def _show_importance(out: Output, path: Path, pattern: re.Pattern[str] | None) -> None:
    from quantcli.report.coverage import coverage_document, coverage_tables, read_coverage

    coverage = read_coverage(path)
    entries = tuple(
        entry for entry in coverage.entries if pattern is None or pattern.search(entry.name)
    )
    if not entries:
        raise UsageError("the filter is found in no entry's name", hint="leave --filter out")
    if out.json:
        out.document("inspect", 1, coverage_document(coverage, entries))
        return
    out.heading(str(path))
    for table in coverage_tables(coverage, entries):
        out.table(table)
