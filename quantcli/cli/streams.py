"""Standard output and error that outlive their reader.

``quantcli inspect m | head`` closes the pipe early: that is no failure, and under ``pipefail`` it
must end with 0, yet typer, rich and Python's own flush at exit each turn it into 1 or 120. So the
lowest layer drops what nobody reads any more, and a long quantization finishes even when the
window that showed its progress is gone. Every other write error (a full disk) is raised, once: the
flushes that follow would only repeat it.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from quantcli.cli import sign_of_life

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Pipe(io.FileIO):
    """A file descriptor that swallows what is written after its reader has left."""

    _lost = False

    def write(self, data: ReadableBuffer, /) -> int:
        sign_of_life.take_away()
        if not self._lost:
            try:
                return super().write(data)
            except BrokenPipeError:
                self._lost = True
            except OSError as error:
                self._lost = True
                raise OSError(error.errno, error.strerror, "standard output") from error
        return memoryview(data).nbytes


def _tolerant(stream: TextIO) -> TextIO:
    stream.flush()
    # The interpreter keeps the original stream, so the descriptor must not be closed twice; a
    # name that the terminal's encoding lacks is shown escaped rather than being an error.
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.isatty() or stream is sys.stderr,
    )


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace")


def install() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr``; what is written to a closed one is dropped."""
    # Of a closed descriptor Python has None, which nothing can write to.
    sys.stdout = _tolerant(sys.stdout) if sys.stdout is not None else _nowhere()
    sys.stderr = _tolerant(sys.stderr) if sys.stderr is not None else _nowhere()
