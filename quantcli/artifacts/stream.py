"""A file that is written from its first byte to its last, into a pipe.

Every offset of a GGUF is known before its first weight, so whoever reads the pipe gets the bytes
that the file would have. Slabs are encoded by several threads and end in any order; what comes
before its turn waits, and its thread with it where too much does. What a file gets at its end, the
digest of its source, a pipe cannot take, so such a file has none.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from quantcli.artifacts.atomic import Stamps
from quantcli.errors import InterruptedRunError, OutputError
from quantcli.interrupts import asked

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STREAM = Path("-")
"""The output that is standard output."""

_DESCRIPTOR = 1
_MOST_WAITING = 32 << 20
_LOOK_SECONDS = 0.2


def check_stream() -> None:
    """OutputError where standard output takes no file: a terminal, or a closed one."""
    try:
        mode = os.fstat(_DESCRIPTOR).st_mode
    except OSError as error:
        raise OutputError(f"standard output is closed: {error.strerror}") from error
    if os.isatty(_DESCRIPTOR):
        raise OutputError(
            "standard output is a terminal, which a GGUF would fill with garbage",
            hint="pipe it into a program, or name a file with -o",
        )
    if stat.S_ISDIR(mode):
        raise OutputError("standard output is a folder", hint="pipe it into a program")


class StreamSink:
    """Standard output as the one file of an artifact of ``size`` bytes.

    ``extents`` are the offsets and lengths of all that will be written; what lies between them is
    zeros. A context manager; `write` may be called from several threads, each extent's parts in any
    order as long as all before them have been begun.
    """

    def __init__(self, size: int, extents: Iterable[tuple[int, int]]) -> None:
        self._size = size
        ends = sorted((start, start + length) for start, length in extents if length)
        starts = [start for start, _ in ends[1:]] + [size]
        self._gaps = {end: start for (_, end), start in zip(ends, starts, strict=True)}
        self._position = 0
        self._waiting: dict[int, bytes] = {}
        self._held = 0
        self._turn = threading.Condition()
        self._error: OutputError | None = None

    def __enter__(self) -> Self:
        check_stream()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._turn:
            self._error = self._error or OutputError("writing was stopped")
            self._waiting.clear()
            self._turn.notify_all()

    def write(self, path: Path, offset: int, data: ReadableBuffer) -> None:
        """Send ``data`` when its turn has come; OutputError when nobody reads any more."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        with self._turn:
            while offset > self._position and self._held + len(view) > _MOST_WAITING:
                self._refuse()
                self._turn.wait(_LOOK_SECONDS)
                if asked.is_set():
                    raise InterruptedRunError("the run was interrupted")
            self._refuse()
            if offset > self._position:
                self._waiting[offset] = bytes(view)
                self._held += len(view)
                return
            self._send(view)
            while self._position in self._waiting:
                part = self._waiting.pop(self._position)
                self._held -= len(part)
                self._send(memoryview(part))
            self._turn.notify_all()

    def _refuse(self) -> None:
        if self._error is not None:
            raise self._error

    def _send(self, view: memoryview) -> None:
        try:
            self._send_all(view)
            after = self._gaps.get(self._position)
            if after is not None:
                self._send_all(memoryview(bytes(after - self._position)))
        except OSError as error:
            why = error.strerror or str(error)
            if isinstance(error, BrokenPipeError):
                why = f"its reader left after {self._position:,} of {self._size:,} bytes"
            self._error = OutputError(f"standard output: {why}")
            self._turn.notify_all()
            raise self._error from error

    def _send_all(self, view: memoryview) -> None:
        while view:
            sent = os.write(_DESCRIPTOR, view)
            view = view[sent:]
            self._position += sent

    def flush(self) -> Stamps:
        """Nothing is held back; OutputError unless all has been sent."""
        with self._turn:
            self._refuse()
            if self._position != self._size:
                raise OutputError(
                    f"standard output: {self._position:,} of {self._size:,} bytes were written"
                )
        return {}

    def publish(self) -> None:
        """The reader has it all."""
