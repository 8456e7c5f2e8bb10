"""The one way to write weights: slabs of the source are read, encoded and put at their offsets.

An artifact is decided before: its files, their sizes and every offset. Headers go first, slabs in
any order by any number of threads, names last; the bytes depend on the model and the recipe alone.
Several artifacts of a checkpoint are made from one read of it: a slab is read and hashed once, its
rows go to the encoder of each, and what several hold alike (Q4_K_S and Q4_K_M share most tensors)
is encoded once. One whose disk gives out is given up, and the others go on.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from quantcli.artifacts.atomic import AtomicFiles, Stamps
from quantcli.artifacts.atomic_folder import AtomicFolder
from quantcli.artifacts.read_ahead import AHEAD_BYTES, ReadAhead
from quantcli.artifacts.slabs import Slab, hash_rows, work_slabs
from quantcli.artifacts.stream import StreamSink
from quantcli.errors import OutputError, PlanError, WeightError
from quantcli.formats.native import UnencodableError
from quantcli.plan.budget import BASE_BYTES
from quantcli.sources.address import is_remote
from quantcli.sources.remote_file import KEPT_BYTES
from quantcli.types import Event, Note

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Chunk = tuple[Any, int, "ReadableBuffer"]
"""A file of an artifact, an offset in it, and the bytes that belong there."""


StoredLines = tuple[str, bool, int, int]
"""A stored tensor, whether its columns are meant instead of its rows, and which: from, to."""

Sink = AtomicFiles | AtomicFolder | StreamSink

SlabKey = tuple[int, Hashable]
"""Which source or store, by its identity, and which rows of it."""


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
class ArtifactFlushed(Event):
    """The files are whole and on the disk, and get their names next; by these they are known."""

    paths: tuple[Path, ...]
    stamps: Stamps
    source_digest: str | None = None


@dataclass(frozen=True, slots=True)
class ArtifactFailed(Event):
    """One of several artifacts could not be written; the others are."""

    paths: tuple[Path, ...]
    error: OutputError


@dataclass(frozen=True, slots=True)
class ArtifactPart:
    """What an artifact makes of one slab of its source.

    ``read`` gives the slab's rows, ``encode`` what becomes of them, without changing them; each of
    its chunks is written before the next is asked for. ``refuse`` says where a weight is stored
    that cannot be encoded; None where any can.

    Parts of one slab that have the same ``content`` make one chunk of the same data, which is
    encoded once and put at the ``place`` of each: a file of the artifact and an offset. ``home`` is
    the stored tensor that the rows come from, and about where in it they begin: what several
    artifacts make of one is made in a row, so that what they read is still there. ``stored`` says
    what the rows are, if they are rows or columns just as they are stored. ``is_there``: all of it
    lies at its place already, and is made once more only where a digest of it is wanted.
    """

    slab: Slab
    read: Callable[[], NDArray[Any]]
    encode: Callable[[NDArray[Any]], Iterable[Chunk]]
    refuse: Callable[[UnencodableError], WeightError] | None = None
    content: Hashable | None = None
    place: tuple[Any, int] = ("", 0)
    home: tuple[str, int] = ("", 0)
    stored: StoredLines | None = None
    is_there: bool = False


class Target(Protocol):
    """Takes the chunks of a slab that are an artifact's."""

    @property
    def artifact(self) -> Artifact:
        """Whose they are."""

    @property
    def error(self) -> OutputError | None:
        """Why it takes no more."""

    def write(self, file: Any, offset: int, data: ReadableBuffer) -> None:
        """Take a chunk; what fails is kept in ``error``."""


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
    def is_remote(self) -> bool:
        """Whether each read of a slab is a request over the network."""
        return any(is_remote(info.file) for info in islice(self.tensor_store.tensors.values(), 1))

    def check_source(self) -> None:
        """SourceError where what was read is elsewhere and has changed meanwhile."""
        check: Callable[[], None] | None = getattr(self.tensor_store, "check_unchanged", None)
        if check is not None:
            check()

    @property
    def tensor_store(self) -> Any:
        """Where stored tensors come from; artifacts of several sources may share one."""
        return getattr(self.source, "store", self.source)

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


@dataclass(frozen=True, slots=True)
class Keeping:
    """That what is written stays where an interrupt or a kill stops the run, for one of the same
    ``identity``; with ``resume`` what such a run has left is taken over.
    """

    identity: str
    resume: bool


def write_artifact(
    artifact: Artifact, *, threads: int | None = None, max_memory: int | None = None
) -> Iterator[Event]:
    """Write one artifact; see `write_artifacts`."""
    return write_artifacts([artifact], threads=threads, max_memory=max_memory)


def write_artifacts(
    artifacts: Sequence[Artifact], *, threads: int | None = None, max_memory: int | None = None,
    keeping: Keeping | None = None,
) -> Iterator[Event]:  # fmt: skip
    """Write artifacts, yielding notes and progress, and an `ArtifactDone` as each is whole.

    A slab that several make something of is read once. ``threads`` defaults to the processors, and
    to as many as fit into ``max_memory`` bytes. Whatever ends the iteration early (an error, an
    interrupt, closing the generator) leaves no file under a final name but those that were said to
    be whole, and an existing one untouched. With ``keeping`` an interrupt leaves what is written
    in its place for a run that goes on. Of several, one that cannot be written ends as
    `ArtifactFailed`; OutputError where none is left.
    """
    if keeping is not None:
        from quantcli.artifacts.kept_slabs import SlabKeeper, keep_content

    workers = min(threads_within(artifact, threads, max_memory) for artifact in artifacts)
    yield from dict.fromkeys(note for artifact in artifacts for note in artifact.notes)
    with ExitStack() as stack:
        writings = [Writing(artifact, artifact.open()) for artifact in artifacts]
        for writing in writings:
            if keeping is not None:
                keep_content(writing, keeping)
            stack.enter_context(writing.sink)
            writing.write_all(writing.artifact.heads())
        hashed = any(artifact.hashed for artifact in artifacts)
        shared = share_slabs(writings)
        slabs = [parts[0][0].slab for parts in shared.values()]
        reads = [parts[0][0].read for parts in shared.values()]
        keeper = None if keeping is None else SlabKeeper(writings, shared, stack)
        if keeper is not None and keeper.found:
            yield Note(f"{keeper.found} of {len(shared)} slabs are there already")
        if any(artifact.is_remote for artifact in artifacts):
            fresh = [
                index for index, key in enumerate(shared) if keeper is None or not keeper.has(key)
            ]
            wanted = [reads[index] for index in fresh], [slabs[index].nbytes for index in fresh]
            ahead = stack.enter_context(ReadAhead(*wanted))
            for number, index in enumerate(fresh):
                reads[index] = partial(ahead.take, number)
        tasks = [
            (
                slab,
                partial(do_slab, read, parts, hashed) if keeper is None
                else partial(keeper.do, key, read, hashed),
            )
            for slab, read, (key, parts) in zip(slabs, reads, shared.items(), strict=True)
        ]  # fmt: skip
        told: list[Writing] = []
        # Closed before the files are, which its threads write to.
        work = stack.enter_context(closing(work_slabs(tasks, workers)))
        while True:
            try:
                progress = next(work)
            except StopIteration as ended:
                hashes = dict(zip(shared, ended.value, strict=True))
                break
            yield from _tell_failed(writings, told)
            yield progress
        for artifact in artifacts:
            artifact.check_source()
        if keeper is not None:
            # Windows removes no open file.
            keeper.close()
        for writing in writings:
            yield from writing.publish(hashes)
        yield from _tell_failed(writings, told)


def share_slabs(
    writings: Sequence[Writing],
) -> dict[SlabKey, list[tuple[ArtifactPart, Writing]]]:
    """The slabs with what is made of each, in their order.

    Of several writings, what they make of the same rows stands together, and tensor by tensor in
    the order of the rows. Each of the writings gets its ``places``.
    """
    shared: dict[SlabKey, list[tuple[ArtifactPart, Writing]]] = {}
    for writing in writings:
        artifact = writing.artifact
        for part in artifact.parts():
            key: SlabKey = id(artifact.source), part.slab
            if part.stored is not None and len(writings) > 1:
                key = id(artifact.tensor_store), part.stored
            uses = shared.setdefault(key, [])
            writing.places.append(Place(key, len(uses), part.slab))
            uses.append((part, writing))
    if len(writings) < 2:
        # In the order of the file, on which one that is sent through a pipe depends.
        return shared
    order: dict[str, int] = {}
    for parts in shared.values():
        order.setdefault(parts[0][0].home[0], len(order))

    def turn(uses: list[tuple[ArtifactPart, Writing]]) -> tuple[int, int]:
        tensor, row = uses[0][0].home
        return order[tensor], row

    return dict(sorted(shared.items(), key=lambda item: turn(item[1])))


@dataclass(frozen=True, slots=True)
class Hashes:
    """SHA-256 of a slab's rows as they were read, and of what was written for each of its uses.

    Empty where nobody records it.
    """

    read: bytes
    written: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of an artifact is made: what is read, which of its uses, the artifact's slab."""

    key: SlabKey
    use: int
    slab: Slab


@dataclass(eq=False)
class Writing:
    """An artifact that is being written, from several threads, until its ``error``.

    ``places`` has that of each of its parts.
    """

    artifact: Artifact
    sink: Sink
    places: list[Place] = field(default_factory=list)
    error: OutputError | None = None
    _busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write_all(self, chunks: Iterable[Chunk]) -> None:
        """Write chunks before anything else is; OutputError."""
        for chunk in chunks:
            self.sink.write(*chunk)

    def write(self, file: Any, offset: int, data: ReadableBuffer) -> None:
        """Write a chunk, unless the artifact has been given up; it is if that fails.

        Its space is free again as soon as no thread writes to it.
        """
        with self.using() as is_open:
            if is_open:
                try:
                    self.sink.write(file, offset, data)
                except OutputError as error:
                    self.error = self.error or error

    @contextmanager
    def using(self) -> Iterator[bool]:
        """Whether its files are open, which they stay meanwhile."""
        with self._lock:
            is_open = self.error is None
            self._busy += is_open
        try:
            yield is_open
        finally:
            if is_open:
                with self._lock:
                    self._busy -= 1
                    if self.error is not None and self._busy == 0:
                        self.sink.__exit__(None, None, None)

    def leaves(self, hashes: Mapping[SlabKey, Hashes]) -> dict[Slab, bytes]:
        """SHA-256 of the rows of each of its slabs."""
        return {place.slab: hashes[place.key].read for place in self.places}

    def publish(self, hashes: Mapping[SlabKey, Hashes]) -> Iterator[Event]:
        """Give the files their names, unless the artifact is or must be given up.

        Yields `ArtifactFlushed` before and `ArtifactDone` after.
        """
        artifact = self.artifact
        digest = artifact.digest(self.leaves(hashes))
        written = (hashes[place.key].written[place.use] for place in self.places)
        content = hashlib.sha256(b"".join(written))
        for chunk in artifact.tails(digest, content.hexdigest()):
            self.write(*chunk)
        try:
            if self.error is None:
                stamps = self.sink.flush()
        except OutputError as error:
            self.error = error
        if self.error is None:
            yield ArtifactFlushed(artifact.paths, stamps, digest)
            try:
                self.sink.publish()
            except OutputError as error:
                self.error = error
        if self.error is not None:
            self.sink.__exit__(None, None, None)
            return
        yield ArtifactDone(artifact.paths, artifact.nbytes, artifact.bits_per_weight, digest)


def _tell_failed(writings: Sequence[Writing], told: list[Writing]) -> Iterator[ArtifactFailed]:
    """What has failed since the last call; its OutputError where nothing else is left."""
    for writing in writings:
        if writing.error is None or writing in told:
            continue
        if all(each.error is not None for each in writings):
            raise writing.error
        told.append(writing)
        yield ArtifactFailed(writing.artifact.paths, writing.error)


def do_slab(
    read: Callable[[], NDArray[Any]], parts: Sequence[tuple[ArtifactPart, Target]], hashed: bool
) -> Hashes:
    """Read a slab, encode and write it for each artifact; what nobody records is not hashed."""
    rows = read()
    leaf = hash_rows(rows) if hashed else b""
    encoded: set[Hashable] = set()
    written = [b""] * len(parts)
    for index, (part, writing) in enumerate(parts):
        if part.content in encoded or writing.error is not None:
            continue
        twins = []
        if part.content is not None:
            encoded.add(part.content)
            same = enumerate(parts[index + 1 :], index + 1)
            twins = [place for place, each in same if each[0].content == part.content]
        sealed = [place for place in (index, *twins) if parts[place][1].artifact.sealed]
        if part.is_there and not sealed:
            continue
        digest = hashlib.sha256()
        try:
            for file, offset, data in part.encode(rows):
                if not part.is_there:
                    writing.write(file, offset, data)
                for other, its in (parts[place] for place in twins):
                    its.write(*other.place, data)
                if sealed:
                    digest.update(data)
        except UnencodableError as refused:
            if part.refuse is None:
                raise
            raise part.refuse(refused) from refused
        for place in sealed:
            written[place] = digest.digest()
    return Hashes(leaf, written)


def default_threads() -> int:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def peak_memory(artifact: Artifact, threads: int) -> int:
    """Bytes of resident memory that writing needs at most, as an estimate."""
    return base_memory(artifact) + threads * artifact.thread_bytes


def base_memory(artifact: Artifact) -> int:
    """What is needed whatever the threads: of a remote model also what is read ahead and kept."""
    return BASE_BYTES + (AHEAD_BYTES + KEPT_BYTES if artifact.is_remote else 0)


def threads_within(artifact: Artifact, threads: int | None, max_memory: int | None) -> int:
    """How many threads may work so that resident memory stays below ``max_memory`` bytes.

    PlanError when one thread alone needs more.
    """
    fit = count_fitting(artifact, threads, max_memory)
    if fit < 1 and max_memory is not None:
        needed = peak_memory(artifact, 1)
        raise PlanError(
            f"{artifact.label} needs up to {needed:,} bytes of memory even on one thread, "
            f"more than the {max_memory:,} allowed",
            hint=f"--max-memory {-(-needed // 10**6)}M is enough",
        )
    return fit


def count_fitting(artifact: Artifact, threads: int | None, max_memory: int | None) -> int:
    """The same, and 0 where one thread alone needs more."""
    wanted = threads or default_threads()
    if max_memory is None:
        return wanted
    return max(
        0, min(wanted, (max_memory - base_memory(artifact)) // max(1, artifact.thread_bytes))
    )
