"""One look at a checkpoint, a GGUF or an importance matrix: as tables and as a document."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.artifacts.write import default_threads
from quantcli.errors import SourceError, UsageError
from quantcli.events import Events, in_phase, take
from quantcli.fit.machine import Machine
from quantcli.report import document, listing, overview
from quantcli.report.coverage import coverage_document, coverage_tables, read_coverage
from quantcli.report.fit import fit_document, fit_sentences, fit_subject, fit_tables
from quantcli.report.inspection import Subject
from quantcli.report.opening import open_subject
from quantcli.report.stats import WeightStats
from quantcli.report.tables import Table
from quantcli.report.weights import WeightSource, WeightStatsDone, measure_weights
from quantcli.sources.resolve import Resolved, resolve
from quantcli.types import Note


@dataclass(frozen=True)
class Inspected:
    """What was found, for people and for programs."""

    title: str
    tables: Sequence[Table]
    document: Mapping[str, Any]
    sentences: Sequence[str] = ()
    """What stands above the tables."""


@dataclass(frozen=True)
class FitWish:
    """The machine that a type should fit, and how the model would run there."""

    machine: Machine
    context: int | None = None
    cache: str | None = None
    flash: bool = True


def inspect(
    target: str, *, tensors: bool, kv: bool, stats: bool, pattern: str | None, order: str | None,
    top: int, threads: int | None, fit: FitWish | None = None, every: bool = False,
    on_fetch: Callable[..., None] | None = None,
) -> Events[Inspected]:  # fmt: skip
    """Look at ``target`` from headers alone, but with ``stats``; UsageError or SourceError.

    Of the Hub, weights are read for statistics alone. ``fit`` tells the type to take for a
    machine, ``every`` lists all types and key-values. ``on_fetch`` takes the progress.
    """
    listing.check_order(order, stats=stats)
    wanted = listing.compile_filter(pattern)
    found = resolve(target, on_progress=on_fetch, weights=False)
    if found.is_remote and not stats:
        yield Note("reading the headers on the Hub; the weights stay there")
    if found.kind == "imatrix":
        given = {"--tensors": tensors, "--kv": kv, "--stats": stats, "--sort": order is not None}
        given["--fit"] = fit is not None
        for name in (name for name, is_given in given.items() if is_given):
            raise UsageError(f"{name} does not apply to an importance matrix", hint="leave it out")
        return _inspect_importance(found, wanted)
    if kv and found.kind != "gguf":
        raise UsageError(
            "--kv shows the key-values of a GGUF, and this is a checkpoint",
            hint=f"its settings are in {found.path / 'config.json'}",
        )
    with open_subject(found, target, weights=stats) as subject:
        for sentence in subject.notes:
            yield Note(sentence, "warning")
        chosen = listing.choose_tensors(subject, wanted, order)
        if wanted is not None and not chosen:
            raise UsageError(
                f"--filter {pattern!r} is found in no tensor's name",
                hint="--tensors lists the names",
            )
        fields = document.model_document(subject, chosen, full_values=kv)
        tables: list[Table] = []
        sentences: list[str] = []
        if fit is not None:
            found_fit = fit_subject(
                subject, fit.machine, context=fit.context, cache=fit.cache, flash=fit.flash
            )
            fields["fit"] = fit_document(found_fit)
            sentences, tables = fit_sentences(found_fit), fit_tables(found_fit, every=every)
        if tensors or ((wanted or order) and not stats):
            tables.append(listing.tensor_table(subject, chosen))
        if kv:
            tables.append(listing.key_value_table(subject.metadata, full=True))
        if stats:
            sources = listing.choose_sources(subject, chosen, order)
            pairs = listing.sort_stats((yield from _measure(subject, sources, threads)), order)
            fields["stats"] = document.stats_document(sources, pairs, top)
            tables += [listing.stats_table(sources, pairs), listing.channel_table(pairs, top)]
        if not (tensors or kv or stats or wanted or order or fit):
            tables += overview.overview_tables(subject, every=every)
            if every:
                tables.append(listing.key_value_table(subject.metadata, full=False))
        return Inspected(subject.label, tables, fields, sentences)


def _measure(
    subject: Subject, sources: Sequence[WeightSource], threads: int | None
) -> Events[Mapping[str, WeightStats]]:
    if not sources:
        raise SourceError(f"{subject.label}: no tensor among these can be read as numbers")
    events = measure_weights(sources, threads or default_threads())
    result = (yield from in_phase("measuring", take(events, WeightStatsDone))).stats
    broken = [name for name, found in result.items() if found.nonfinite]
    if broken:
        yield Note(
            f"NaN or infinities in {len(broken)} of {len(result)} tensors are left out of the "
            f"numbers: {', '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}",
            "warning",
        )
    return result


def _inspect_importance(found: Resolved, wanted: re.Pattern[str] | None) -> Inspected:
    coverage = read_coverage(found.path)
    entries = tuple(
        entry for entry in coverage.entries if wanted is None or wanted.search(entry.name)
    )
    if not entries:
        raise UsageError("the filter is found in no entry's name", hint="leave --filter out")
    tables = coverage_tables(coverage, entries)
    return Inspected(str(found.path), tables, coverage_document(coverage, entries))
