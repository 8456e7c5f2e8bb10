"""The command line in real terminals of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from support.forks import Forks

_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
_LEFT = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI")
"""Variables of the tests' own terminal that must not be seen."""


class Screen(NamedTuple):
    """What a command left behind: its exit code, and the lines of its terminal or pipe."""

    code: int
    lines: tuple[str, ...]


def run_in_terminal(forks: Forks, words: Sequence[str], columns: int | None, folder: str) -> Screen:
    """``quantcli`` with these words on a terminal of so many columns, or (None) in a pipe."""
    ours, theirs = os.pipe() if columns is None else pty.openpty()
    if columns is not None:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in _LEFT}
    parts: list[bytes] = []
    reading = threading.Thread(target=_read_all, args=(ours, parts))
    reading.start()
    code = forks.run(words, folder, env | {"TERM": "xterm-256color"}, theirs)
    reading.join()
    text = b"".join(parts).decode().replace("\r\n", "\n")
    return Screen(code, tuple(_visible(line) for line in text.split("\n")))


def cells(text: str) -> int:
    """How many columns a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _read_all(file: int, parts: list[bytes]) -> None:
    while True:
        try:
            part = os.read(file, 1 << 16)
        except OSError:  # the other end of a terminal is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(file)


def _visible(line: str) -> str:
    """What is left of a line that was drawn over: the text after the last return."""
    return _CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip()
