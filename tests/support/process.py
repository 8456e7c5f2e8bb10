"""Runs the real command line in a process, with commands of a test's own where it needs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

EXTRA = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import typer
from quantcli.cli import app as cli
from quantcli.cli.options import command
from quantcli.cli.output import Output
from quantcli.errors import GateError, SourceError, UsageError
from quantcli.events import PhaseBegun, PhaseDone
from quantcli.interrupts import wait_unless_interrupted
from quantcli.types import Note, Progress

def fail(kind: str) -> None:
    if kind == "source":
        raise SourceError("m.gguf: is cut short", hint="download it again")
    if kind == "gate":
        raise GateError("perplexity 9.7 is above 9.5")
    if kind == "usage":
        raise UsageError("there is no type Q4_KM", hint="did you mean Q4_K_M?")
    if kind == "file":
        Path("/nonexistent/folder/x").read_bytes()
    if kind == "memory":
        raise MemoryError
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "socket":
        raise BrokenPipeError(32, "Broken pipe")
    raise KeyError("nobody expects me")

@command
def lines(out: Output, count: int) -> None:
    for number in range(count):
        out.line(f"line {number} " + "x" * 80)

def wait(folder: Path, seconds: float) -> None:
    temporary = folder / "temporary"
    temporary.write_text("half")
    try:
        time.sleep(seconds)
    finally:
        time.sleep(0.3)
        temporary.unlink()
        (folder / "cleaned").write_text("yes")

class Dropping:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __del__(self) -> None:
        (self.folder / "dropping").write_text("yes")
        time.sleep(30)

def lose(folder: Path) -> None:
    Dropping(folder)
    wait(folder, 30)

def download(folder: Path) -> None:
    def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            (folder / "temporary").write_text("half")
            pool.submit(time.sleep, 60).result()
    wait_unless_interrupted(run, threading.Event())

@command
def work(out: Output) -> None:
    out.event(PhaseBegun("working"))
    for step in range(1, 6):
        out.event(Progress(step * 1000, 5000, f"blk.{step}.weight"))
        time.sleep(0.1)
    out.event(PhaseDone("working", 0.5))
    out.event(Note("a remark"))
    out.event(Note("a warning", level="warning"))
    out.detail("a detail")
    out.result("/tmp/result.gguf")

for command in (fail, lines, wait, lose, download, work):
    cli.app.command(command.__name__)(command)
if __name__ == "__main__":
    cli.main()
"""


def command(folder: Path | None = None) -> list[str]:
    """The command line's start: the installed program, or with `EXTRA` commands in ``folder``."""
    if folder is None:
        return [sys.executable, "-m", "quantcli"]
    script = folder / "extra_cli.py"
    script.write_text(EXTRA)
    return [sys.executable, str(script)]


def environment(**changes: str) -> dict[str, str]:
    """Ours without what changes colours or debugging, and with ``changes``."""
    unset = {"NO_COLOR", "FORCE_COLOR", "QUANTCLI_DEBUG", "GITHUB_ACTIONS", "COLUMNS", "TERM"}
    kept = {key: value for key, value in os.environ.items() if key not in unset}
    return {**kept, "PYTHONUNBUFFERED": "", "TERM": "xterm-256color", **changes}


def run(
    *args: str | Path, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end, output captured."""
    return subprocess.run(
        [*command(folder), *map(str, args)],
        capture_output=True,
        text=True,
        env=environment(**(env or {})),
        timeout=120,
        check=False,
    )
