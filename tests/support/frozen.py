"""Runs the frozen commands, in this process, and takes the digests of what they write."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from support.frozen_commands import COMMANDS, Command, resolve
from support.frozen_inputs import is_input, write_input

GOLDEN = Path(__file__).parents[1] / "golden" / "frozen.json"
TOLERANCE = 1e-3
"""Of figures, relative to the larger of two."""
_VARYING = (
    "free_disk_bytes", "peak_memory_bytes", "scratch_bytes", "estimated_seconds", "threads",
)  # fmt: skip
"""What a document says about the machine."""

Made = dict[str, Any]
"""SHA-256 by file, and of what was printed by "stdout"; or the document itself by "numbers"."""


class Workspace:
    """A folder in which commands run, each once, after those whose output they read."""

    def __init__(self, root: Path, threads: int = 2) -> None:
        self._root = root.resolve()
        self._threads = threads
        self._made: dict[str, Made] = {}

    def run(self, name: str) -> Made:
        """What the command makes, or the digests of an input; RuntimeError when it fails."""
        if name not in self._made:
            if is_input(name):
                write_input(name, self._root)
                self._made[name] = self._digests(self._root / name)
            else:
                self._made[name] = self._run(COMMANDS[name])
        return self._made[name]

    def _run(self, command: Command) -> Made:
        for needed in command.references:
            self.run(needed)
        folder = self._root / command.name
        folder.mkdir()
        args = [resolve(word) for word in command.words]
        if command.output:
            args += ["-o", f"{command.name}/{command.output}"]
        plain = "--print-recipe" in args or "-q" in args
        args.append("-q" if plain else "--json")
        with chdir(self._root), _plain_environment():
            printed = _call([*args, "--threads", str(self._threads)])
        made = self._digests(folder)
        (folder / "stdout").write_text(printed)
        if plain:
            return made | {"stdout": _digest(printed.encode())}
        document = _settled(json.loads(printed))
        if command.kind == "numbers":
            return made | {"numbers": document}
        return made | {"stdout": _digest(json.dumps(document, sort_keys=True).encode())}

    def _digests(self, path: Path) -> Made:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        base = path if path.is_dir() else path.parent
        # A Modelfile names the GGUF by its whole path.
        here = os.fsencode(self._root)
        return {
            file.relative_to(base).as_posix(): _digest(file.read_bytes().replace(here, b"."))
            for file in files
            if file.is_file()
        }


def difference(found: Made, expected: Made) -> str | None:
    """The first file that differs, or None; figures may differ by `TOLERANCE`."""
    for key in sorted(found.keys() | expected.keys()):
        if key not in expected:
            return f"{key} is new"
        if key not in found:
            return f"{key} is missing"
        close = _close if key == "numbers" else lambda one, other: one == other
        if not close(found[key], expected[key]):
            return f"{key} differs"
    return None


def _call(args: list[str]) -> str:
    from quantcli.cli.app import run

    printed, said = io.BytesIO(), io.BytesIO()
    out, err = (io.TextIOWrapper(raw, encoding="utf-8") for raw in (printed, said))
    with redirect_stdout(out), redirect_stderr(err):
        code = run(args)
    out.flush()
    err.flush()
    if code:
        reason = said.getvalue().decode()
        raise RuntimeError(f"quantcli {' '.join(args)}: exit code {code}\n{reason}")
    return printed.getvalue().decode()


@contextmanager
def _plain_environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= {"COLUMNS": "80", "NO_COLOR": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _settled(value: Any) -> Any:
    """The document without what depends on the machine, floats to six digits."""
    if isinstance(value, dict):
        return {key: _settled(each) for key, each in value.items() if key not in _VARYING}
    if isinstance(value, list):
        return [_settled(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-7)
    return bool(one == other)
