"""A terminal shows something within half a second, and nothing of it stays."""

from __future__ import annotations

import os
import pty
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from quantcli.cli import sign_of_life, streams
sign_of_life.show_soon(sys.argv[1:])
streams.install()
time.sleep(float(sys.argv[1]))
print("the first line", file=sys.stderr, flush=True)
time.sleep(0.5)
print("the second line", flush=True)
"""


def on_a_terminal(*arguments: str) -> list[tuple[float, bytes]]:
    """Run the program on a terminal of its own: what it wrote, and when."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM, *arguments])
    start, found = time.monotonic(), []
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        found.append((time.monotonic() - start, data))
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    return found


def test_the_word_comes_and_goes() -> None:
    written = on_a_terminal("2")
    assert written[0][1] == b"starting ..."
    assert written[0][0] < 1.9, "it came before the first line, which takes two seconds"
    text = b"".join(data for _, data in written)
    assert text == b"starting ...\r\x1b[Kthe first line\r\nthe second line\r\n"


@pytest.mark.parametrize("arguments", [("0",), ("1", "-q"), ("1", "--json")])
def test_nothing_is_shown_in_a_quick_or_a_quiet_run(arguments: tuple[str, ...]) -> None:
    assert b"".join(data for _, data in on_a_terminal(*arguments)).startswith(b"the first line")


def test_nothing_is_shown_in_a_pipe(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        child = os.posix_spawn(
            sys.executable, [sys.executable, "-c", PROGRAM, "1"], os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), number) for number in (1, 2)],
        )  # fmt: skip
        os.waitpid(child, 0)
    assert log.read_bytes() == b"the first line\nthe second line\n"
