"""What is written of a set stays when the run is stopped, and the next goes on within its files.

Beside each unfinished output lies a log: of each slab that was written, where it lies and a sum of
it, and what the digests at the end are made of. A run that goes on reads over what the log tells,
so that a slab which never reached the disk is found and made anew. What belongs to another model or
other options has another name, and is cleared away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.atomic_folder import AtomicFolder
from quantcli.artifacts.stream import StreamSink
from quantcli.artifacts.write import (
    Artifact,
    ArtifactPart,
    Hashes,
    Keeping,
    SlabKey,
    Writing,
    do_slab,
)
from quantcli.errors import OutputError
from quantcli.ranks.slab_sums import FoldOnce, Recorder, SlabLog, SlabRecord, read_log

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from numpy.typing import NDArray


def files_of(writing: Writing) -> AtomicFiles | AtomicFolder:
    """Where it writes; OutputError for a pipe, which keeps nothing."""
    if isinstance(writing.sink, StreamSink):
        raise OutputError("standard output cannot be shared", hint="name a file with -o")
    return writing.sink


def keep_content(writing: Writing, keeping: Keeping) -> None:
    """Before it is entered: have what is written stay, and with `Keeping.resume` what is there."""
    whole = hashlib.sha256(keeping.identity.encode())
    for file, offset, data in writing.artifact.heads():
        name = file.name if isinstance(file, Path) else file
        whole.update(f"{name}\0{offset}\0".encode())
        whole.update(data)
    files_of(writing).keep(f"kept-{whole.hexdigest()[:16]}", resume=keeping.resume)


def read_written(writing: Writing, file: str, offset: int, length: int) -> bytes:
    """What lies in a file of an output, by its name, that is being written; nothing where it can
    not be read."""
    own: Mapping[str, Any] = {path.name: path for path in writing.artifact.paths}
    with writing.using() as is_open, suppress(OutputError):
        if is_open:
            return files_of(writing).read(own.get(file, file), offset, length)
    return b""


@dataclass(eq=False)
class Recording:
    """A target of a slab's chunks that notes where they go."""

    writing: Writing
    recorder: Recorder = field(default_factory=Recorder)

    @property
    def artifact(self) -> Artifact:
        """Whose they are."""
        return self.writing.artifact

    @property
    def error(self) -> OutputError | None:
        """Why it takes no more."""
        return self.writing.error

    def write(self, file: Any, offset: int, data: ReadableBuffer) -> None:
        """Write a chunk."""
        self.writing.write(file, offset, data)
        self.recorder.add(file.name if isinstance(file, Path) else file, offset, data)

    def record(self, rank: int, made: Hashes, use: int) -> SlabRecord:
        """What is to be known of the slab's use that this is."""
        content, runs = made.written[use], tuple(self.recorder.runs)
        return SlabRecord(rank, made.read, content, self.recorder.sum.digest(), runs)


class SlabKeeper:
    """Makes slabs that are not there yet and logs them; from any thread.

    The ``writings`` are entered, and keep their content; ``stack`` closes their logs.
    """

    def __init__(
        self, writings: Sequence[Writing],
        shared: Mapping[SlabKey, Sequence[tuple[ArtifactPart, Writing]]], stack: ExitStack,
    ) -> None:  # fmt: skip
        stack.callback(self.close)
        self._shared = shared
        self._logs: dict[int, SlabLog] = {}
        self._records: dict[tuple[int, int], SlabRecord] = {}
        self._numbers: dict[SlabKey, list[int]] = {key: [] for key in shared}
        for index, writing in enumerate(writings):
            for number, place in enumerate(writing.places):
                self._numbers[place.key].append(number)
            path = files_of(writing).log_path
            with suppress(FileNotFoundError):
                found = read_log(path)
                self._records |= {(index, number): record for (_, number), record in found}
            self._logs[index] = SlabLog(path)
        self._indices = {id(writing): index for index, writing in enumerate(writings)}

    @property
    def found(self) -> int:
        """How many slabs are there already, as far as their logs tell."""
        return sum(self.has(key) for key in self._shared)

    def has(self, key: SlabKey) -> bool:
        """Whether all that is made of a slab is there, as far as the logs tell."""
        return all(record is not None for record in self._recorded(key))

    def do(self, key: SlabKey, read: Callable[[], NDArray[Any]], hashed: bool) -> Hashes:
        """`do_slab` of what is not there as its log tells."""
        uses = self._shared[key]
        records = [
            record if record is not None and record.holds(partial(read_written, writing)) else None
            for record, (_, writing) in zip(self._recorded(key), uses, strict=True)
        ]
        rest = [use for use, record in enumerate(records) if record is None]
        if rest:
            # Outputs that hold a slab alike are given the same pieces.
            once = FoldOnce()
            targets = [Recording(uses[use][1], Recorder(once)) for use in rest]
            parts = [(uses[use][0], target) for use, target in zip(rest, targets, strict=True)]
            made = do_slab(read, parts, hashed)
            for place, (use, target) in enumerate(zip(rest, targets, strict=True)):
                records[use] = target.record(0, made, place)
                if target.error is None:
                    self._log(target.writing, self._numbers[key][use], records[use])
        held = [record for record in records if record is not None]
        return Hashes(held[0].read, [record.content for record in held])

    def close(self) -> None:
        """Bring the logs to the disk."""
        while self._logs:
            with suppress(OSError):
                self._logs.popitem()[1].close()

    def _recorded(self, key: SlabKey) -> list[SlabRecord | None]:
        indices = (self._indices[id(writing)] for _, writing in self._shared[key])
        places = zip(indices, self._numbers[key], strict=True)
        return [self._records.get(place) for place in places]

    def _log(self, writing: Writing, number: int, record: SlabRecord | None) -> None:
        name = writing.artifact.paths[0].name
        if record is not None:
            # What a full disk does not take would be made anew, no more.
            with suppress(OSError):
                self._logs[self._indices[id(writing)]].add([((name, number), record)])
