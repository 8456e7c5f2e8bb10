"""An export from an artifact's name to a decided job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from quantcli.errors import SourceError, UsageError
from quantcli.exports.floats import parse_dtype
from quantcli.exports.targets import TARGETS, ExportOptions, Prepare, Prepared
from quantcli.layouts import LAYOUTS, code_layouts
from quantcli.layouts.base import Layout
from quantcli.plan.size_text import parse_size
from quantcli.report.measured_quality import read_evaluation
from quantcli.sources.remote import open_found_gguf
from quantcli.sources.resolve import Resolved, resolve

_FOLDER, _CODES = "folder", "codes"
_TAKEN_BY = {
    "dtype": ("gguf", _FOLDER),
    "split_max_size": ("gguf", _FOLDER),
    "config": (_FOLDER,),
    "tokenizer": (_FOLDER,),
    "card": ("gguf",),
    "requantize": ("gguf", _CODES),
    "evaluation": ("gguf", "card", _FOLDER),
}
"""The formats that each option means something for: any model folder, or one of codes, or by name.
"""
_STREAMED = ("gguf", "hf")
"""Formats beside layouts whose sources may be read where they are."""
_SPELLING = {"evaluation": "eval"}
"""Options that are not spelled as the fields of `ExportOptions`."""


def make_options(to: str, **words: Any) -> ExportOptions:
    """Options for ``to`` from what the user writes: sizes and dtypes as words.

    UsageError for one that the format does not take.
    """
    TARGETS.get(to)
    given = {
        name: value
        for name, value in words.items()
        if value is not None and (value is not False or name == "check")
    }
    for name in given:
        takers = _takers(name) if name in _TAKEN_BY else [to]
        if to.casefold() not in takers:
            raise UsageError(
                f"--{_SPELLING.get(name, name.replace('_', '-'))} does nothing for --to {to}",
                hint=f"it is for --to {' and --to '.join(takers)}",
            )
    if str(given.get("output")) == "-":
        raise UsageError("exports are written to files", hint="name one with -o")
    if given.get("evaluation") and to == "gguf" and not given.get("card"):
        raise UsageError("--eval goes into a model card", hint="add --card")
    if "split_max_size" in given:
        given["split_max_size"] = parse_size(given["split_max_size"])
    if "dtype" in given:
        given["dtype"] = parse_dtype(given["dtype"])
    if "evaluation" in given:
        read_evaluation(given["evaluation"])
    return ExportOptions(**given)


@contextmanager
def open_export(
    artifacts: Sequence[str | Path],
    to: str,
    options: ExportOptions,
    *,
    download: bool = False,
    on_progress: Callable[..., None] | None = None,
) -> Iterator[Prepared]:
    """Decide everything about an export; within the block its `Prepared.run` does the work.

    ``artifacts`` is one, or all shards of one GGUF; ``download`` stores one of the Hub first.
    Raises a QuantcliError in one sentence.
    """
    prepare = _find_target(to)
    # What is made of files as such, or by others, needs them on this machine.
    streams = to.casefold() in _STREAMED or isinstance(TARGETS.get(to), Layout)
    found = resolve(str(artifacts[0]), on_progress=on_progress, weights=download or not streams)
    _check_shards(found, artifacts)
    with ExitStack() as stack:
        yield prepare(found, str(artifacts[0]), options, stack)


def _find_target(to: str) -> Prepare:
    found = TARGETS.get(to)
    if isinstance(found, Layout):
        from quantcli.exports.to_packed import prepare

        return partial(prepare, found)
    return cast(Prepare, found)


def _takers(option: str) -> list[str]:
    takers = []
    for name in _TAKEN_BY[option]:
        folders = {_FOLDER: list(LAYOUTS), _CODES: code_layouts()}
        takers += folders.get(name, [name])
    return takers


def _check_shards(found: Resolved, artifacts: Sequence[str | Path]) -> None:
    """SourceError unless several artifacts are the files of one split GGUF."""
    if len(artifacts) < 2:
        return
    if found.kind != "gguf":
        raise SourceError(f"{artifacts[0]} is no shard of a GGUF", hint="name one artifact")
    store = open_found_gguf(found)
    store.close()
    files = {file.resolve() for file in store.files}
    for other in artifacts:
        if Path(other).resolve() not in files:
            raise SourceError(
                f"{other} is not a shard of the model that {artifacts[0]} belongs to",
                hint="name one artifact, or the shards of one",
            )
