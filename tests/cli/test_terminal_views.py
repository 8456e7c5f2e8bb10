"""Views in a real terminal of 80 and of 120 columns.

What must hold of each: no line is wider than the terminal, a header stands on one line, words are
whole, and a row of a table is one line.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

TEXT = Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt"
_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
NAME = "a-model-whose-name-is-really-longer-than-most-columns-of-a-terminal-Instruct-2512"

VIEWS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "dry run": (
        "quantize {model} --bits 4 --dry-run", 0, ("tensor shape from to size", "peak memory")
    ),
    "dry run of a folder": ("quantize {model} --to gptq --dry-run", 0, ("peak memory",)),
    "dry run of a set": (
        "quantize {model} --set popular --dry-run", 0, ("type bits per weight size",)
    ),
    "error": ("quantize {model} --type Q4_KM", 2, ("did you mean", "Q4_K_M")),
    "error of an option": ("eval-ppl {q4} --max-kld 1 --data {text}", 2, ("--reference",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def names(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the views are of; the model has a long name."""
    from quantcli.cli.app import run as run_here

    folder = tmp_path_factory.mktemp("views")
    (folder / NAME).symlink_to(mini)
    found = {"model": str(folder / NAME), "mini": str(mini), "text": str(TEXT), "name": NAME}
    for kind in ("Q4_0",):
        path = folder / f"{NAME}-{kind}.gguf"
        assert run_here(["quantize", str(mini), "--type", kind, "-q", "-o", str(path)]) == 0
        found[kind[:2].lower()] = str(path)
    return found


@pytest.fixture(scope="module")
def show(
    names: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], list[str]]:
    """``show(view, columns)``: the lines that remain on the terminal."""

    @cache
    def lines(view: str, columns: int) -> list[str]:
        line, code, _ = VIEWS[view]
        words = shlex.split(line.format(new=tmp_path_factory.mktemp("new"), **names))
        status, screen = _run_in_terminal(words, columns)
        assert status == code, screen[-2000:]
        return [_visible(each) for each in screen.split("\n")]

    return lines


def _run_in_terminal(words: list[str], columns: int) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    left = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI"}
    env = {name: value for name, value in os.environ.items() if name not in left}
    child = subprocess.Popen(
        [sys.executable, "-m", "quantcli", *words], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**env, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the child's end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    return child.wait(), b"".join(parts).decode().replace("\r\n", "\n")


def _visible(line: str) -> str:
    """What is left of a line that was drawn over: the text after the last return."""
    return _CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip()


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_fits(view: str, columns: int, show: Callable[[str, int], list[str]]) -> None:
    lines = show(view, columns)
    wide = [line for line in lines if _cells(line) > columns]
    # A path that is to be copied is printed whole.
    assert [line for line in wide if " " in line.strip()] == []
    spaced = [" ".join(line.split()) for line in lines]
    for header in VIEWS[view][2]:
        assert any(header in line for line in spaced), (header, lines)
    # What is folded by letters leaves lines of a few of them.
    assert [line for line in lines if re.fullmatch(r"\s*\w{1,2}\s*", line)] == []
