"""The one way to write weights: slabs of the source are read, encoded and put at their offsets.

An artifact is decided before: its files, their sizes and every offset. Headers go first, slabs in
any order by any number of threads, names last; the bytes depend on the model and the recipe alone.
Several artifacts of one source are made from one read of it: a slab is read and hashed once, and
its rows go to the encoder of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.atomic_folder import AtomicFolder
from quantcli.artifacts.slabs import Slab, hash_rows, work_slabs
from quantcli.errors import PlanError, WeightError
from quantcli.formats.native import UnencodableError
from quantcli.plan.budget import BASE_BYTES
from quantcli.types import Event, Note

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Chunk = tuple[Any, int, "ReadableBuffer"]
"""A file of an artifact, an offset in it, and the bytes that belong there."""


Sink = AtomicFiles | AtomicFolder

_Key = tuple[int, Slab]
"""Which source, by its identity, and which of its slabs."""


@dataclass(frozen=True, slots=True)
class ArtifactDone(Event):
    """The files are whole: their paths, and bytes and bits per weight of all together.

    ``bits_per_weight`` and ``source_digest`` are None for an artifact that quantizes nothing.
    """

    paths: tuple[Path, ...]
    nbytes: int
    bits_per_weight: float | None = None
    source_digest: str | None = None


@dataclass(frozen=True, slots=True)
class ArtifactPart:
    """What an artifact makes of one slab of its source.

    ``read`` gives the slab's rows, ``encode`` what becomes of them, without changing them; each of
    its chunks is written before the next is asked for. ``refuse`` says where a weight is stored
    that cannot be encoded; None where any can.
    """

    slab: Slab
    read: Callable[[], NDArray[Any]]
    encode: Callable[[NDArray[Any]], Iterable[Chunk]]
    refuse: Callable[[UnencodableError], WeightError] | None = None


class Artifact(Protocol):
    """A decided file or folder: everything but the weights has been read and checked."""

    @property
    def hashed(self) -> bool:
        """Whether it records a digest of the source, or something that is made of one."""
        return False

    @property
    def label(self) -> str:
        """What the user calls the source."""

    @property
    def source(self) -> object:
        """What the slabs are read from; two artifacts of one source share what they read."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files (or the folder) that will be there."""

    @property
    def nbytes(self) -> int:
        """Exact size of all files together."""

    @property
    def thread_bytes(self) -> int:
        """Memory that a thread needs at most, as an estimate."""

    @property
    def bits_per_weight(self) -> float | None:
        """Over all tensors; None where nothing is quantized."""
        return None

    @property
    def notes(self) -> Sequence[Note]:
        """What the user should know of the plan."""

    def open(self) -> Sink:
        """The files or the folder, to be entered and written."""

    def heads(self) -> Iterable[Chunk]:
        """What is written first."""

    def parts(self) -> Iterable[ArtifactPart]:
        """The slabs, in the order in which they are read."""

    def digest(self, leaves: Mapping[Slab, bytes]) -> str | None:
        """The digest of the source, made of its slabs' own; None where it is not `hashed`."""
        return None

    def tails(self, digest: str | None) -> Iterable[Chunk]:
        """What is written last, when the digest is known."""
        return ()


def write_artifact(
    artifact: Artifact, *, threads: int | None = None, max_memory: int | None = None
) -> Iterator[Event]:
    """Write one artifact; see `write_artifacts`."""
    return write_artifacts([artifact], threads=threads, max_memory=max_memory)


def write_artifacts(
    artifacts: Sequence[Artifact], *, threads: int | None = None, max_memory: int | None = None
) -> Iterator[Event]:
    """Write artifacts, yielding notes and progress, at last an `ArtifactDone` for each.

    A slab that several make something of is read once. ``threads`` defaults to the processors, and
    to as many as fit into ``max_memory`` bytes. Whatever ends the iteration early (an error, an
    interrupt, closing the generator) leaves no file under a final name and an existing one
    untouched.
    """
    workers = min(threads_within(artifact, threads, max_memory) for artifact in artifacts)
    yield from dict.fromkeys(note for artifact in artifacts for note in artifact.notes)
    with ExitStack() as stack:
        sinks = [artifact.open() for artifact in artifacts]
        for sink in sinks:
            stack.enter_context(sink)
        shared: dict[_Key, list[tuple[ArtifactPart, Sink]]] = {}
        keys: list[list[_Key]] = []
        for artifact, sink in zip(artifacts, sinks, strict=True):
            _write(sink, artifact.heads())
            keys.append([])
            for part in artifact.parts():
                keys[-1].append((id(artifact.source), part.slab))
                shared.setdefault(keys[-1][-1], []).append((part, sink))
        hashed = any(artifact.hashed for artifact in artifacts)
        tasks = [(slab, partial(_do, parts, hashed)) for (_, slab), parts in shared.items()]
        leaves = dict(zip(shared, (yield from work_slabs(tasks, workers)), strict=True))
        digests = []
        for artifact, sink, own in zip(artifacts, sinks, keys, strict=True):
            digests.append(artifact.digest({key[1]: leaves[key] for key in own}))
            _write(sink, artifact.tails(digests[-1]))
        for sink in sinks:
            sink.publish()
    for artifact, digest in zip(artifacts, digests, strict=True):
        yield ArtifactDone(artifact.paths, artifact.nbytes, artifact.bits_per_weight, digest)


def _do(parts: Sequence[tuple[ArtifactPart, Sink]], hashed: bool) -> bytes:
    """Read a slab, encode and write it for each artifact; returns the rows' SHA-256."""
    rows = parts[0][0].read()
    leaf = hash_rows(rows) if hashed else b""
    for part, sink in parts:
        try:
            _write(sink, part.encode(rows))
        except UnencodableError as refused:
            if part.refuse is None:
                raise
            raise part.refuse(refused) from refused
    return leaf


def _write(sink: Sink, chunks: Iterable[Chunk]) -> None:
    for chunk in chunks:
        sink.write(*chunk)


def default_threads() -> int:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def peak_memory(artifact: Artifact, threads: int) -> int:
    """Bytes of resident memory that writing needs at most, as an estimate."""
    return BASE_BYTES + threads * artifact.thread_bytes


def threads_within(artifact: Artifact, threads: int | None, max_memory: int | None) -> int:
    """How many threads may work so that resident memory stays below ``max_memory`` bytes.

    PlanError when one thread alone needs more.
    """
    wanted = threads or default_threads()
    if max_memory is None:
        return wanted
    fit = (max_memory - BASE_BYTES) // max(1, artifact.thread_bytes)
    if fit < 1:
        needed = peak_memory(artifact, 1)
        raise PlanError(
            f"{artifact.label} needs up to {needed:,} bytes of memory even on one thread, "
            f"more than the {max_memory:,} allowed",
            hint=f"--max-memory {-(-needed // 10**6)}M is enough",
        )
    return min(wanted, fit)
