"""A batch of trials in a forked process that is watched from outside.

A command that takes too long is sent an alarm, which leaves its stack and kills the process. Time
in which the process could have run and the machine had no processor for it does not count.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from support.fuzz.case import Kind
from support.fuzz.child import limit, run_trial
from support.fuzz.measures import remove, waited

SECONDS = 10
PATIENCE = 12
"""How many times longer a command may take on a machine that is busy."""
_GLANCE = 0.25


def run_batch(kind: Kind, numbers: range, folder: Path, bases: Any) -> Iterator[dict[str, Any]]:
    """The outcomes of a kind's trials, until the process dies, which is the last one's fault."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+") as stacks:
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                _serve(kind, numbers, folder, bases, writer, stacks)
            finally:
                os._exit(0)
        os.close(writer)
        at_work = numbers[0]
        for line in _lines(reader, child):
            outcome = json.loads(line)
            if "begin" not in outcome:
                yield outcome
                at_work = outcome["number"] + 1
        _, status = os.waitpid(child, 0)
        if at_work not in numbers:
            return
        stacks.seek(0)
        stack = stacks.read()
    remove(folder / f"trial-{child}-{at_work}")
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    late = number == signal.SIGALRM
    frames = [line.strip() for line in stack.splitlines() if "/quantcli/" in line]
    yield {
        "kind": kind.name, "number": at_work, "what": _describe(kind, at_work, folder, bases),
        "command": "", "code": -1, "said": "", "memory": 0, "trace": stack[-4000:],
        "fault": "time" if late else f"crash: {signal.Signals(number).name if number else status}",
        "frame": frames[0].rpartition("/quantcli/")[2] if frames else "?",
        "seconds": float(SECONDS) if late else 0.0,
    }  # fmt: skip


def _lines(reader: int, child: int) -> Iterator[str]:
    """What the child writes, line by line; it is stopped when a command takes too long."""
    rest = b""
    began, before, stopped = time.monotonic(), 0.0, False
    while True:
        ready, _, _ = select.select([reader], [], [], _GLANCE)
        if ready:
            got = os.read(reader, 1 << 16)
            if not got:
                os.close(reader)
                return
            *whole, rest = (rest + got).split(b"\n")
            for line in whole:
                if line.startswith(b'{"begin"'):
                    began, before = time.monotonic(), waited(child)
                yield line.decode()
            continue
        taken = time.monotonic() - began
        own = taken - (waited(child) - before)
        if not stopped and (own > SECONDS or taken > SECONDS * PATIENCE):
            os.kill(child, signal.SIGALRM)
            stopped = True
        elif stopped and taken > SECONDS * PATIENCE:
            os.kill(child, signal.SIGKILL)


def _serve(kind: Kind, numbers: range, folder: Path, bases: Any, writer: int, stacks: Any) -> None:
    """The child's part."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limit(stacks)
    with os.fdopen(writer, "w", encoding="utf-8") as answers:

        def tell(answer: dict[str, Any]) -> None:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

        for number in numbers:
            place = folder / f"trial-{os.getpid()}-{number}"
            tell(run_trial(kind, number, place, bases, lambda: tell({"begin": number})))  # noqa: B023


def _describe(kind: Kind, number: int, folder: Path, bases: Any) -> str:
    """What a trial does, found without running it."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name) / "in"
        place.mkdir()
        kept = Path.cwd()
        try:
            os.chdir(place)
            case = kind.make(Random(f"{kind.name} {number}"), place, bases)
        finally:
            os.chdir(kept)
        return f"{case.what} | " + " ; ".join(" ".join(c.args) for c in case.commands)
