"""An importance matrix in its other form: GGUF (sums and counts) or legacy (.dat, means).

The legacy form has one count for a whole stack of experts, so going there gives up each expert's
own count, and coming back cannot tell it again; the means are what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from quantcli.artifacts.atomic import refuse_existing, refuse_own, write_file
from quantcli.artifacts.imatrix_container import Calibration, pack_gguf, pack_legacy
from quantcli.artifacts.write import ArtifactDone
from quantcli.errors import SourceError, UsageError
from quantcli.exports.targets import ExportOptions, Prepared, stem
from quantcli.sources.gguf import is_gguf
from quantcli.sources.imatrix import ImatrixSums, read_legacy_sums, read_sums
from quantcli.sources.resolve import Resolved
from quantcli.types import Event

LEGACY_WINDOW = 512
"""Tokens of a window that a legacy file is taken to have: llama-imatrix's default."""


def export_matrix(
    source: Path, output: Path, *, legacy: bool, force: bool = False
) -> Iterator[Event]:
    """Write the importance matrix ``source`` to ``output``; yields `ArtifactDone` at last.

    SourceError when it is broken, OutputError when ``output`` exists and not ``force``.
    """
    refuse_existing([output], force=force)
    calibration = _load(source)
    body = pack_legacy(calibration) if legacy else pack_gguf(calibration)
    write_file(output, body, force=force)
    yield ArtifactDone((output,), len(body))


def _load(source: Path) -> Calibration:
    found: ImatrixSums = (
        read_sums(source) if is_gguf(source) else read_legacy_sums(source, LEGACY_WINDOW)
    )
    squares = {name: sums.astype(np.float64) for name, (sums, _) in found.entries.items()}
    counts = {name: count.astype(np.int64) for name, (_, count) in found.entries.items()}
    return Calibration(
        squares, counts, found.datasets, found.chunks, found.chunk_size, found.enough
    )


def prepare_gguf(found: Resolved, label: str, options: ExportOptions, stack: ExitStack) -> Prepared:
    """Decide ``--to imatrix``: the GGUF form."""
    return _prepare(found, label, options, legacy=False)


def prepare_legacy(
    found: Resolved, label: str, options: ExportOptions, stack: ExitStack
) -> Prepared:
    """Decide ``--to dat``: the legacy form."""
    return _prepare(found, label, options, legacy=True)


def _prepare(found: Resolved, label: str, options: ExportOptions, *, legacy: bool) -> Prepared:
    if found.kind != "imatrix":
        raise SourceError(
            f"{label} is no importance matrix",
            hint="quantcli calibrate makes one; --to gguf or --to hf converts a model",
        )
    if is_gguf(found.path) != legacy:
        raise UsageError(f"{label} is an importance matrix of that form already")
    output = options.output or Path(f"{stem(found)}{'.dat' if legacy else '.gguf'}")
    if options.check:
        refuse_own([output], [found.path])
        refuse_existing([output], force=options.force)
    form = "means times calls (legacy)" if legacy else "sums and counts (GGUF)"
    return Prepared(
        (output,), 0, f"an importance matrix as {form}",
        lambda: export_matrix(found.path, output, legacy=legacy, force=options.force),
    )  # fmt: skip
