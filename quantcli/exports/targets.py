"""What an artifact can be exported to, and what an export is before it runs.

A target is a function that decides everything from headers, or refuses in one sentence; the work
is what its `Prepared.run` yields. A new target is a module and a line in `TARGETS`; every layout of
`quantcli.layouts` is a target, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from quantcli.layouts import LAYOUTS, OF_RUNTIMES
from quantcli.registry import Registry, not_callable
from quantcli.sources.resolve import Resolved
from quantcli.types import Event

TARGETS = Registry(
    "export format",
    "exports",
    {
        "gguf": "quantcli.exports.to_gguf:prepare",
        "hf": "quantcli.exports.to_hf:prepare",
        "imatrix": "quantcli.exports.importance_matrices:prepare_gguf",
        "dat": "quantcli.exports.importance_matrices:prepare_legacy",
        "ollama": "quantcli.exports.ollama:prepare",
        "card": "quantcli.exports.cards:prepare",
    },
    not_callable,
    base=LAYOUTS,
    meant=OF_RUNTIMES,
)
"""By the name that ``--to`` takes: a `Prepare`, or the `Layout` of a folder of a GGUF's codes."""


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked for; sizes in bytes, dtypes as "F32", "F16" or "BF16".

    ``config`` and ``tokenizer`` are checkpoint folders to take settings and tokenizer files from.
    """

    output: Path | None = None
    dtype: str | None = None
    split_max_size: int | None = None
    config: Path | None = None
    tokenizer: Path | None = None
    card: bool = False
    evaluation: Path | None = None
    requantize: bool = False
    force: bool = False
    check: bool = True
    threads: int = 1


@dataclass(frozen=True)
class Prepared:
    """A decided export: the files (or the folder), their bytes, a sentence, and the work."""

    paths: tuple[Path, ...]
    nbytes: int
    sentence: str
    run: Callable[[], Iterator[Event]]


Prepare = Callable[[Resolved, str, ExportOptions, ExitStack], Prepared]
"""Takes the artifact, its name as the user wrote it, the options, and a stack that closes files."""


def stem(found: Resolved) -> str:
    """What an artifact is called, without its place, its suffix and its number among shards."""
    name = found.repo.rpartition("/")[2] if found.repo else found.path.resolve().name
    name = re.sub(r"\.(gguf|dat|imatrix)$", "", name)
    return re.sub(r"-\d{5}-of-\d{5}$", "", name)
