"""What a rank leaves of each slab that it has written: where it lies, and a digest of 32 bytes.

The digest is there to find what is torn: SHA-256 over the sums of the data's 64-bit words, down
and across a table 1,024 words wide. That goes at the speed of memory, where SHA-256 over the data
itself would cost as much as a tenth of the encoding. Where a slab lies is told in runs: pieces of
one length at even distances, one run for rows that follow one another, and one for columns.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.systems import BINARY, CLOEXEC, NOFOLLOW

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_WIDTH = 1024
_TABLE = 8 * _WIDTH

Run = tuple[str, int, int, int, int]
"""A file of the output, an offset, the length of a piece, the distance of two, how many."""


def fold(data: ReadableBuffer) -> bytes:
    """What a `Sum` takes of a piece: sums down and across, and what fills no line."""
    view = memoryview(data)
    values = np.frombuffer(view if view.contiguous else bytes(view), np.uint8)
    table = values[: values.size // _TABLE * _TABLE].view(np.uint64).reshape(-1, _WIDTH)
    parts = [values[table.size * 8 :].tobytes()]
    if table.size:
        parts = [np.add.reduce(table, axis=axis).tobytes() for axis in (0, 1)] + parts
    return b"".join(parts)


class FoldOnce:
    """`fold` for several outputs that are given the same pieces one after the other."""

    def __init__(self) -> None:
        self._last: tuple[ReadableBuffer, bytes] | None = None

    def __call__(self, data: ReadableBuffer) -> bytes:
        """The same; of the piece before, what was found then."""
        if self._last is None or self._last[0] is not data:
            self._last = data, fold(data)
        return self._last[1]


class Sum:
    """A digest of data that comes in pieces; the same pieces give the same."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()

    def add(self, data: ReadableBuffer, fold: Callable[[ReadableBuffer], bytes] = fold) -> None:
        """Take a piece."""
        self._whole.update(fold(data))

    def digest(self) -> bytes:
        """The 32 bytes."""
        return self._whole.digest()


@dataclass
class Recorder:
    """Takes the chunks of a slab as they are written."""

    fold: Callable[[ReadableBuffer], bytes] = fold
    runs: list[Run] = field(default_factory=list)
    sum: Sum = field(default_factory=Sum)

    def add(self, file: str, offset: int, data: ReadableBuffer) -> None:
        """A chunk went to ``offset`` of ``file``."""
        length = memoryview(data).nbytes
        if not length:
            return
        self.sum.add(data, self.fold)
        if self.runs:
            name, start, piece, step, count = self.runs[-1]
            step = offset - start if count == 1 else step
            if (name, piece) == (file, length) and step > 0 and offset == start + count * step:
                self.runs[-1] = (name, start, piece, step, count + 1)
                return
        self.runs.append((file, offset, length, 0, 1))


@dataclass(frozen=True, slots=True)
class SlabRecord:
    """What a rank left of one slab of an output.

    ``read`` is SHA-256 of the rows as they were read, ``content`` that of what was written, where
    the output records it, ``sum`` the digest of `Sum`.
    """

    rank: int
    read: bytes
    content: bytes
    sum: bytes
    runs: tuple[Run, ...]

    def holds(self, read: Callable[[str, int, int], bytes]) -> bool:
        """Whether ``read(file, offset, length)`` gives what was written."""
        found = Sum()
        for file, start, length, step, count in self.runs:
            for index in range(count):
                data = read(file, start + index * step, length)
                if len(data) != length:
                    return False
                found.add(data)
        return found.digest() == self.sum


Key = tuple[str, int]
"""An output, by its name, and which of its parts."""


class SlabLog:
    """A file that a rank adds its records to, from any thread, one line for each slab."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | BINARY | NOFOLLOW | CLOEXEC
        self._file = os.open(path, flags, 0o600)
        self._lock = threading.Lock()

    def add(self, records: Sequence[tuple[Key, SlabRecord]]) -> None:
        """A slab has been written, for each of its uses."""
        lines = [
            [*key, record.rank, record.read.hex(), record.content.hex(), record.sum.hex(),
             record.runs]
            for key, record in records
        ]  # fmt: skip
        view = memoryview(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        with self._lock:
            while view:
                view = view[os.write(self._file, view) :]

    def close(self) -> None:
        """What was added reaches the disk."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)


def read_log(path: Path) -> Iterator[tuple[Key, SlabRecord]]:
    """The records of a log; a last line that was torn is left out."""
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                fields: list[Any] = json.loads(line)
                output, number, rank, read, content, sums, runs = fields
                record = SlabRecord(
                    int(rank), bytes.fromhex(read), bytes.fromhex(content), bytes.fromhex(sums),
                    tuple((str(f), int(a), int(b), int(c), int(d)) for f, a, b, c, d in runs),
                )  # fmt: skip
            except (ValueError, TypeError):
                continue
            yield (str(output), int(number)), record
