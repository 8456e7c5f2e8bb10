"""Runs that are killed at one instant after another, and what must be true after each.

An instant is a call that changes something on the disk: the process is killed before it, or when
half of it is done. What has a final name then must be whole, old or new, and the same command must
go on from whatever else lies there to the very bytes of a run that nobody stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from support.faults import Server
from support.writing_commands import COMMANDS, read_all

from quantcli.errors import QuantcliError
from quantcli.sources.gguf import open_gguf

KILLED = -9


@dataclass(frozen=True)
class Kill:
    """One kill: what was wrong after it, nothing where all was right."""

    command: str
    spec: str
    resumed: bool
    wrong: str


def instants(count: int, most: int) -> list[str]:
    """At most ``most`` specs, spread evenly over ``count`` calls, before and in the middle."""
    every = [f"{kind}:{number}" for number in range(1, count + 1) for kind in ("kill", "torn")]
    step = max(1.0, len(every) / most)
    return [every[int(i * step)] for i in range(min(most, len(every)))]


def kill_all(
    server: Server, name: str, words: Mapping[str, Path], root: Path, most: int
) -> Iterator[Kill]:
    """Kill one of the commands at up to ``most`` instants, one after another."""
    command = COMMANDS[name]
    out, kept = root / "out", root / "kept"
    for folder in (out, kept):
        shutil.rmtree(folder, ignore_errors=True)
    kept.mkdir(parents=True)
    if command.older:
        ended = server.run(command.older_args(words, kept), "count", kept)
        assert ended.code == 0, ended.said
    older = read_all(kept)
    # What it loads, the server has from now on, and each run of it is quick.
    shutil.copytree(kept, out)
    ended = server.warm(command.args(words, out))
    assert ended.code == 0, ended.said
    shutil.rmtree(out)
    shutil.copytree(kept, out)
    ended = server.run(command.args(words, out), "count", out)
    assert ended.code == 0, ended.said
    newer = read_all(out)
    assert newer, name
    assert newer != older
    for spec in instants(ended.count, most):
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        code = server.run(command.args(words, out), spec, out).code
        wrong = "" if code == KILLED else f"ended with {code}"
        wrong = wrong or _find_fault(out, older, newer)
        begun = any(out.rglob("state.json")) or any(out.glob(".quantcli-set-*.json"))
        begun = begun or any(out.rglob("kept-*.log"))
        more = "--resume" if command.resumes and begun else ""
        again = server.run(command.args(words, out, more), "count", out)
        if again.code != 0 and "exists already" in again.said and not (more and command.several):
            # Some of it had been given its name.
            again = server.run(command.args(words, out, "--force"), "count", out)
        if not wrong and again.code != 0:
            wrong = f"again: {again.said.strip()}"
        elif not wrong and read_all(out) != newer:
            wrong = f"again: other files, {_differing(read_all(out), newer)}"
        yield Kill(name, spec, bool(more), wrong)


def _find_fault(out: Path, older: Mapping[str, bytes], newer: Mapping[str, bytes]) -> str:
    """What is wrong with that which has a final name."""
    found = {name: data for name, data in read_all(out).items() if not name.startswith(".")}
    if found in ({}, older, newer):
        return ""
    for name, data in found.items():
        if data not in (older.get(name), newer.get(name)):
            return f"{name} is neither old nor new"
    shards = [name for name in newer if "-of-" in name]
    if not shards:
        # Of several outputs each is whole, and of a folder all files are there.
        tops = {name.partition("/")[0] for name in newer}
        parts = [
            top
            for top in sorted(tops)
            if _below(found, top) not in ({}, _below(older, top), _below(newer, top))
        ]
        return f"{parts[0]} is there in part" if parts else ""
    for name in found:
        try:
            open_gguf(out / name).close()
        except QuantcliError:
            continue
        return f"{name} is read, from a mixture"
    return ""


def _below(files: Mapping[str, bytes], top: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.partition("/")[0] == top}


def _differing(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> str:
    names = sorted(found.keys() | wanted.keys())
    return ", ".join(name for name in names if found.get(name) != wanted.get(name))
