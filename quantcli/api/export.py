"""``quantcli.export``: an artifact in another format, or checked, from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.api.calls import Names, Watch, as_names, as_path, refuse_below_one, takes_keywords
from quantcli.api.to_store import into_store
from quantcli.artifacts.write import ArtifactDone, default_threads
from quantcli.errors import SourceError, UsageError
from quantcli.events import Show, drain, in_phase, take
from quantcli.exports.job import make_options, open_export
from quantcli.exports.report.job import report_paths, write_report
from quantcli.exports.targets import TARGETS
from quantcli.exports.to_hub import plan_upload, upload_artifacts
from quantcli.exports.verdicts import verdict_document, verdict_tables
from quantcli.exports.verify import VerificationDone
from quantcli.exports.verify import verify as run_verify
from quantcli.model import open_model
from quantcli.plan.budget import free_disk
from quantcli.report.measured_quality import read_evaluation
from quantcli.report.tables import Column, Table, facts
from quantcli.report.units import size_text
from quantcli.types import Event, Note

HUB, REPORT = "hub", "report"
"""Each ``to`` that takes several artifacts, as they are."""


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote, would write or checked; ``document`` is what ``--json`` prints.

    ``summary`` says what was done in a phrase. ``tables`` are for people; what was written has
    none.
    """

    paths: tuple[Path, ...]
    nbytes: int
    summary: str
    tables: tuple[Table, ...]
    document: Mapping[str, Any]
    notes: tuple[Note, ...]
    url: str | None = None
    """Where an upload went."""


@takes_keywords
@into_store
def export(
    artifact: Names,
    output: str | Path | None = None,
    *,
    to: str | None = None,
    dtype: str | None = None,
    split_max_size: str | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    requantize: bool = False,
    card: bool = False,
    evaluation: str | Path | None = None,
    repo: str | None = None,
    public: bool = False,
    force: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    against: str | Path | None = None,
    download: bool = False,
    threads: int | None = None,
    on_event: Show | None = None,
) -> ExportResult:
    """Convert an artifact (or all shards of a GGUF) to the format ``to``.

    ``output`` defaults to a name made of the artifact's, in the current folder. ``config`` and
    ``tokenizer`` are folders to take settings and tokenizer files from, ``evaluation`` what
    ``quantcli eval-ppl --json`` printed, for the model ``card``. ``requantize`` rounds a second
    time what the other format does not hold. ``to="hub"`` uploads artifacts as they are to
    ``repo``, which is created if need be, private unless ``public``. ``to="report"`` writes a page
    and a card about all of them into the folder ``output``, with errors ``against`` the model that
    they were made from. ``verify`` writes nothing but
    decodes and checks every weight, and measures the error ``against`` another model; what it
    finds wrong is a
    `SourceError` that carries the result as ``result``. ``download`` stores an artifact of the Hub
    first instead of reading it where it is.
    """
    refuse_below_one(threads=threads)
    names = as_names(artifact)
    watch = Watch(on_event)
    if verify:
        if to is not None:
            raise UsageError("--verify writes nothing, and --to does", hint="give one of them")
        other = None if against is None else str(against)
        return _verify(names, other, threads or default_threads(), watch)
    reports = to is not None and to.casefold() == REPORT
    if against is not None and not reports:
        raise UsageError("--against measures a difference", hint="add --verify or --to report")
    if to is None:
        raise UsageError(
            "--to FORMAT is missing",
            hint=f"one of {', '.join([*TARGETS, REPORT, HUB])}; or --verify",
        )
    given: dict[str, Any] = {
        "dtype": dtype, "split-max-size": split_max_size, "config": config,
        "tokenizer": tokenizer, "requantize": requantize, "card": card,
    }  # fmt: skip
    if to.casefold() == HUB:
        if repo is None:
            raise UsageError("--to hub needs a repository", hint="--repo your-name/your-model")
        _refuse_given(given | {"output": output, "eval": evaluation, "force": force}, HUB)
        return _push(names, repo, watch, public=public, dry_run=dry_run)
    if reports:
        _refuse_given(given | {"repo": repo, "public": public}, REPORT)
        pages = report_paths(names, as_path(output), force=force, check=not dry_run)
        writing = write_report(
            names, pages,
            evaluation=None if evaluation is None else read_evaluation(Path(evaluation)),
            against=None if against is None else str(against),
            threads=threads or default_threads(), force=force,
        )  # fmt: skip
        return _report(pages, None if dry_run else writing, watch)
    if repo is not None or public:
        raise UsageError("--repo and --public are for uploads", hint="add --to hub")
    options = make_options(
        to,
        output=as_path(output),
        dtype=dtype,
        split_max_size=split_max_size,
        config=as_path(config),
        tokenizer=as_path(tokenizer),
        card=card,
        requantize=requantize,
        evaluation=as_path(evaluation),
        force=force,
        check=not dry_run,
        threads=threads or default_threads(),
    )
    with open_export(names, to, options, download=download, on_progress=watch) as prepared:
        paths, nbytes = prepared.paths, prepared.nbytes
        if not dry_run:
            done = drain(in_phase("exporting", take(prepared.run(), ArtifactDone)), watch)
            paths, nbytes = done.paths, done.nbytes
        summary = prepared.sentence
    document: dict[str, Any] = {"to": to, "paths": list(map(str, paths)), "bytes": nbytes}
    tables: tuple[Table, ...] = ()
    if dry_run:
        document["free_disk_bytes"] = free_disk(paths[0].parent)
        tables = (_plan_table(paths, nbytes, summary, document["free_disk_bytes"]),)
    return ExportResult(paths, nbytes, summary, tables, document, tuple(watch.notes))


def _refuse_given(given: Mapping[str, Any], to: str) -> None:
    for name, value in given.items():
        if value not in (None, False):
            raise UsageError(f"--{name} does nothing for --to {to}", hint="leave it out")


def _report(
    paths: tuple[Path, Path], writing: Iterator[Event] | None, watch: Watch
) -> ExportResult:
    nbytes = 0
    if writing is not None:
        nbytes = drain(in_phase("reporting", take(writing, ArtifactDone)), watch).nbytes
    document: dict[str, Any] = {"to": REPORT, "paths": list(map(str, paths)), "bytes": nbytes}
    summary = "a page and a model card"
    tables: tuple[Table, ...] = ()
    if writing is None:
        document["free_disk_bytes"] = free_disk(paths[0].parent)
        tables = (_plan_table(paths, nbytes, summary, document["free_disk_bytes"]),)
    return ExportResult(paths, nbytes, summary, tables, document, tuple(watch.notes))


def _push(
    names: list[str], repo: str, watch: Watch, *, public: bool, dry_run: bool
) -> ExportResult:
    wanted = plan_upload(names, repo, public=public)
    files = [{"name": name, "bytes": path.stat().st_size} for name, path in wanted.files]
    document: dict[str, Any] = {"to": HUB, "repo": repo, "public": public, "files": files}
    paths, tables, url = tuple(path for _, path in wanted.files), [], None
    if dry_run:
        rows = tuple((name, size_text(path.stat().st_size)) for name, path in wanted.files)
        access = "private, if it is not there yet" if wanted.private else "public, if not there yet"
        tables = [
            Table((Column("file"), Column("size", "right")), rows),
            facts([("repository", f"{repo} ({access})"), ("size", size_text(wanted.nbytes))]),
        ]
    else:
        url = drain(upload_artifacts(names, repo, public=public), watch)
    document |= {"paths": list(map(str, paths)), "bytes": wanted.nbytes, "url": url}
    summary = f"{len(paths)} files in {repo}" if len(paths) != 1 else f"1 file in {repo}"
    return ExportResult(
        paths, wanted.nbytes, summary, tuple(tables), document, tuple(watch.notes), url
    )


def _plan_table(paths: Sequence[Path], nbytes: int, summary: str, free: int) -> Table:
    rows = [*(("output", str(path)) for path in paths), ("what", summary)]
    if nbytes:
        rows.append(("size", f"{size_text(nbytes)} ({nbytes:,} bytes)"))
    return facts([*rows, ("free disk", size_text(free))])


def _verify(names: list[str], against: str | None, threads: int, watch: Watch) -> ExportResult:
    if len(names) > 1:
        raise UsageError("--verify takes one artifact", hint="of a split GGUF, any of its shards")
    with ExitStack() as stack:
        model = stack.enter_context(open_model(names[0], on_progress=watch))
        source = None
        if against is not None:
            source = open_model(against, vocabulary=False, on_progress=watch)
            stack.enter_context(source)
        checking = take(run_verify(model, source, threads=threads), VerificationDone)
        verdict = drain(in_phase("verifying", checking), watch)
        nbytes = sum(line.nbytes for line in verdict.lines)
    result = ExportResult(
        (),
        nbytes,
        "verified",
        tuple(verdict_tables(names[0], against, verdict)),
        verdict_document(names[0], against, verdict),
        tuple(watch.notes),
    )
    if verdict.problems:
        first, *more = verdict.problems
        error = SourceError(first + (f" (and {len(more)} more)" if more else ""))
        error.result = result
        raise error
    return result
