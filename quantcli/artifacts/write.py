"""The one way to write weights: slabs of the source are read, encoded and put at their offsets.

An artifact is decided before: its files, their sizes and every offset. Headers go first, slabs in
any order by any number of threads, names last; the bytes depend on the model and the recipe alone.
Several artifacts of one source are made from one read of it: a slab is read and hashed once, and
its rows go to the encoder of each.
"""

from __future__ import annotations

import hashlib
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
    def sealed(self) -> bool:
        """Whether it records a digest of what is written of its parts."""
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

    def tails(self, digest: str | None, content: str) -> Iterable[Chunk]:
        """What is written last, when the digests of source and content are known."""
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
        shared: dict[_Key, list[_Use]] = {}
        places: list[list[tuple[_Key, int]]] = []
        for artifact, sink in zip(artifacts, sinks, strict=True):
            _write(sink, artifact.heads())
            places.append([])
            for part in artifact.parts():
                key = id(artifact.source), part.slab
                uses = shared.setdefault(key, [])
                places[-1].append((key, len(uses)))
                uses.append(_Use(part, sink, artifact.sealed))
        hashed = any(artifact.hashed for artifact in artifacts)
        tasks = [(slab, partial(_do, uses, hashed)) for (_, slab), uses in shared.items()]
        found = dict(zip(shared, (yield from work_slabs(tasks, workers)), strict=True))
        digests = []
        for artifact, sink, own in zip(artifacts, sinks, places, strict=True):
            digests.append(artifact.digest({key[1]: found[key].read for key, _ in own}))
            written = hashlib.sha256(b"".join(found[key].written[use] for key, use in own))
            _write(sink, artifact.tails(digests[-1], written.hexdigest()))
        for sink in sinks:
            sink.publish()
    for artifact, digest in zip(artifacts, digests, strict=True):
        yield ArtifactDone(artifact.paths, artifact.nbytes, artifact.bits_per_weight, digest)


@dataclass(frozen=True, slots=True)
class _Use:
    """What an artifact makes of a slab, where it goes, and whether that is hashed."""

    part: ArtifactPart
    sink: Sink
    sealed: bool


@dataclass(frozen=True, slots=True)
class _Hashes:
    """SHA-256 of a slab's rows as they were read, and of what was written for each of its uses."""

    read: bytes
    written: Sequence[bytes]


def _do(uses: Sequence[_Use], hashed: bool) -> _Hashes:
    """Read a slab, encode and write it for each artifact; what nobody records is not hashed."""
    rows = uses[0].part.read()
    leaf = hash_rows(rows) if hashed else b""
    written = []
    for use in uses:
        digest = hashlib.sha256() if use.sealed else None
        try:
            _write(use.sink, use.part.encode(rows), digest)
        except UnencodableError as refused:
            if use.part.refuse is None:
                raise
            raise use.part.refuse(refused) from refused
        written.append(b"" if digest is None else digest.digest())
    return _Hashes(leaf, written)


def _write(sink: Sink, chunks: Iterable[Chunk], digest: Any = None) -> None:
    for place, offset, data in chunks:
        if digest is not None:
            digest.update(data)
        sink.write(place, offset, data)


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
