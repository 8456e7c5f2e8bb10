"""One trial in this very process, under limits: what it said, did, took and left behind."""

from __future__ import annotations

import faulthandler
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from types import TracebackType
from typing import IO, Any

from support.fuzz.case import Case, Command, Kind
from support.fuzz.measures import listing, peak, remove, reset_memory, status, waited

MEMORY = 1 << 30
DISK = 256 << 20
SENTENCE = 6000
"""Characters of an error that somebody can still read."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_NOISE = re.compile(r"Traceback \(|Warning: |Exception ignored|panicked at", re.MULTILINE)


def limit(stacks: IO[str]) -> None:
    """Limits of the whole process: memory above what it has, the size of files, no core dumps.

    What is too late is killed by its alarm, and the stack goes to ``stacks``.
    """
    data = int(status("VmData")) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.enable(stacks, all_threads=True)
    faulthandler.register(signal.SIGALRM, stacks, all_threads=True, chain=True)
    # Trials need no disk that survives a power cut, nor the command line built anew each time.
    os.fsync = lambda descriptor: None
    from quantcli.cli import app

    app.get_command = cache(app.get_command)


def run_trial(
    kind: Kind, number: int, folder: Path, bases: Any, begin: Callable[[], None]
) -> dict[str, Any]:
    """Make and run a trial in ``folder``, which is removed; the outcome as JSON's types.

    ``begin`` is called before each of its commands.
    """
    for name in ("in", "out", "tmp"):
        (folder / name).mkdir(parents=True)
    (folder / "precious").write_text("somebody's own\n")
    os.environ["TMPDIR"] = str(folder / "tmp")
    tempfile.tempdir = None
    os.chdir(folder / "in")
    outcome: dict[str, Any] = {"kind": kind.name, "number": number}
    try:
        case = kind.make(Random(f"{kind.name} {number}"), folder / "in", bases)
    except Exception as error:
        remove(folder)
        said = "".join(traceback.format_exception(error))
        frame = top_frame(error.__traceback__)
        return {
            **outcome,
            "what": "",
            "command": "",
            "code": -1,
            "fault": "generator",
            "said": said,
            "seconds": 0.0,
            "memory": 0,
            "frame": frame,
            "trace": said,
        }
    os.chdir(folder / "out")
    outcome["what"] = case.what
    worst = {"seconds": 0.0, "memory": 0}
    try:
        for command in case.commands:
            begin()
            found = _run(command, case, folder)
            worst = {key: max(worst[key], found[key]) for key in worst}
            outcome |= found | worst | {"command": " ".join(command.args)}
            if found["fault"] or found["code"]:
                break
        if case.check is not None and not outcome["fault"]:
            outcome["fault"] = case.check()
    finally:
        os.chdir("/")
        remove(folder)
    return outcome


def _run(command: Command, case: Case, folder: Path) -> dict[str, Any]:
    from quantcli.cli import app

    streams = [_capture(), _capture()]
    before = {name: listing(folder / name) for name in ("in", "out", "tmp")}
    place: dict[str, str] = {}
    usual = app.explain
    fallen: str | None = None

    def explain(error: BaseException) -> Any:
        failure = usual(error)
        if "internal error" in failure.message or isinstance(error, MemoryError):
            place["frame"] = top_frame(error.__traceback__)
            place["trace"] = "".join(traceback.format_exception(error))[-4000:]
        return failure

    kept = sys.stdout, sys.stderr
    below = _Below()
    code: int = -1
    memory = reset_memory()
    began, before_it = time.perf_counter(), waited(os.getpid())
    try:
        sys.stdout, sys.stderr = streams
        app.explain = explain
        with _Meddler(case), warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _show
            code = app.run(list(command.args))
    except BaseException as error:
        fallen = f"{type(error).__name__}: {error}"
        place = {
            "frame": top_frame(error.__traceback__),
            "trace": "".join(traceback.format_exception(error))[-4000:],
        }
    finally:
        sys.stdout, sys.stderr = kept
        app.explain = usual
        raw = below.close()
    seconds = max(0.0, time.perf_counter() - began - (waited(os.getpid()) - before_it))
    taken = max(0, peak() - memory)
    said, told = (_text(stream) for stream in streams)
    told += raw
    after = {name: listing(folder / name) for name in before}
    fault = _judge(command, code, fallen, said, told) or _left(case, code, before, after)
    if fault is None and raw.strip():
        fault = "noise: around Python"
    if fault is None and (folder / "precious").read_text() != "somebody's own\n":
        fault = "destroyed: a file beside"
    return {
        "code": code, "seconds": seconds, "memory": taken, "said": (fallen or told)[-3000:],
        "fault": fault, **place,
    }  # fmt: skip


def _judge(command: Command, code: int, fallen: str | None, said: str, told: str) -> str | None:
    """What is wrong with how a command ended."""
    if fallen is not None:
        return f"traceback: {fallen.splitlines()[0][:80] if fallen else ''}"
    if "internal error" in told:
        return "internal error"
    if "there is not enough memory" in told:
        return "memory"
    if "File too large" in told or "ile too large" in told:
        return "disk"
    if _NOISE.search(told) or _NOISE.search(said):
        return "noise"
    if "--help" not in command.args and (_CONTROLS.search(told) or _CONTROLS.search(said)):
        return "control characters"
    if code not in (0, 1, 2, 3):
        return f"exit code {code}"
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    if code in (1, 2) and len(errors) != 1:
        return "no single sentence"
    if errors and len(errors[0]) > SENTENCE:
        return "long sentence"
    if "--json" in command.args and code in (0, 3) and not _is_json(said):
        return "no JSON"
    if command.sound and code:
        return "unsound"
    return None


def _left(case: Case, code: int, before: Any, after: Any) -> str | None:
    """What is wrong with the files afterwards."""
    if case.meddle is None and after["in"] != before["in"]:
        return "destroyed: an input"
    # torch makes a folder for a compiler's cache as soon as some of its modules are imported.
    new = [name for name in after["tmp"].keys() - before["tmp"].keys()
           if not name.startswith("torchinductor_")]  # fmt: skip
    if new:
        return f"left: a temporary file {new[0]}"
    if any(".partial" in name for name in after["out"]):
        return "left: a partial file"
    # With 3, a limit that was exceeded, the command has done its work.
    if code in (1, 2) and after["out"] != before["out"]:
        return "left: a file of a failed command"
    return None


def top_frame(trace: TracebackType | None) -> str:
    """The innermost frame within quantcli, and the one that raised."""
    own = last = "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        file = code.co_filename.rpartition("site-packages/")[2]
        if "/quantcli/" in file:
            file = "quantcli/" + file.rpartition("/quantcli/")[2]
        last = f"{file}:{trace.tb_lineno} {code.co_name}"
        if file.startswith("quantcli/"):
            own = last
        trace = trace.tb_next
    return own if own == last else f"{own} < {last}"


class _Below:
    """What reaches the descriptors of standard output and error around Python's own objects."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(self._file.fileno(), number)

    def close(self) -> str:
        """Give them back; the text."""
        for number, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, number)
            os.close(kept)
        self._file.seek(0)
        with self._file:
            return self._file.read().decode("utf-8", "replace")


def _show(message: Any, category: Any, *place: Any) -> None:
    """What Python itself does with a warning, whoever records them in this process."""
    sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))


class _Meddler:
    """Calls a case's ``meddle`` at the chosen read."""

    def __init__(self, case: Case) -> None:
        self.case, self.reads, self.usual = case, 0, os.preadv

    def __enter__(self) -> None:
        if self.case.meddle is not None:
            os.preadv = self._read

    def __exit__(self, *_: object) -> None:
        os.preadv = self.usual

    def _read(self, *args: Any) -> int:
        self.reads += 1
        if self.reads == self.case.meddle_at and self.case.meddle is not None:
            self.case.meddle()
        return self.usual(*args)


def _capture() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")


def _text(stream: io.TextIOWrapper) -> str:
    with suppress(ValueError):
        stream.flush()
        return stream.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    return ""


def _is_json(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True
