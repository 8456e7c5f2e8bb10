"""The command line in real terminals of a given width, in processes that are forked from one.

What takes seconds to import is imported once: `Terminals` starts a server, which forks itself for
each command.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
_LEFT = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI")
"""Variables of the tests' own terminal that must not be seen."""


class Screen(NamedTuple):
    """What a command left behind: its exit code, and the lines of its terminal or pipe."""

    code: int
    lines: tuple[str, ...]


class Terminals:
    """A server of terminals; a context manager that ends it."""

    def __init__(self, imports: Sequence[str] = ()) -> None:
        env = {name: value for name, value in os.environ.items() if name not in _LEFT}
        env |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, *imports],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True,
        )  # fmt: skip

    def __enter__(self) -> Terminals:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, words: Sequence[str], columns: int | None, folder: str = ".") -> Screen:
        """The command ``words`` on a terminal of so many columns, or (None) in a pipe."""
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps([list(words), columns, folder]), file=stdin, flush=True)
        code, text = json.loads(stdout.readline())
        lines = text.replace("\r\n", "\n").split("\n")
        return Screen(code, tuple(_visible(line) for line in lines))


def cells(text: str) -> int:
    """How many columns a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _visible(line: str) -> str:
    """What is left of a line that was drawn over: the text after the last return."""
    return _CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip()


def _serve() -> None:
    for name in sys.argv[1:]:
        __import__(name)
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        words, columns, folder = json.loads(line)
        print(json.dumps(_fork(words, columns, folder)), file=answers, flush=True)


def _fork(words: list[str], columns: int | None, folder: str) -> tuple[int, str]:
    ours, theirs = os.pipe() if columns is None else pty.openpty()
    if columns is not None:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    child = os.fork()
    if child == 0:
        _become(theirs, words, folder, is_terminal=columns is not None)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the child's end of a terminal is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), b"".join(parts).decode()


def _become(theirs: int, words: list[str], folder: str, *, is_terminal: bool) -> None:
    """In the child: the command itself, which never returns."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(theirs if is_terminal else null, 0)
    os.dup2(theirs, 1)
    os.dup2(theirs, 2)
    os.chdir(folder)
    for number, mode in enumerate("rww"):
        stream = os.fdopen(number, mode, encoding="utf-8", closefd=False)
        setattr(sys, ("stdin", "stdout", "stderr")[number], stream)
    sys.argv = ["quantcli", *words]
    from quantcli.cli.app import main

    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
