"""Command lines under faults of the filesystem: the shim compiled, and the server that forks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


def compiler() -> str | None:
    """The C compiler, or None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, negative for a signal, the calls counted, its words."""

    code: int
    count: int
    said: str


@dataclass(frozen=True)
class Server:
    """The process that runs command lines under faults below one folder."""

    process: subprocess.Popen[str]
    log: Path

    def warm(self, args: Sequence[object]) -> Ended:
        """Run it in the server itself, which then has loaded what it needs."""
        return self._ask({"args": list(map(str, args)), "warm": True})

    def run(self, args: Sequence[object], spec: str, prefix: Path) -> Ended:
        """Run it with a fault below ``prefix``."""
        return self._ask({"args": list(map(str, args)), "spec": spec, "prefix": str(prefix)})

    def _ask(self, job: dict[str, object]) -> Ended:
        if self.process.stdin is None or self.process.stdout is None:
            raise ValueError("the server has no pipes")
        self.process.stdin.write(json.dumps(job | {"log": str(self.log)}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Ended(answer["code"], answer["count"], self.log.read_text(errors="replace"))


@contextmanager
def fault_server(folder: Path) -> Iterator[Server]:
    """Compile the shim into ``folder`` and start the server with it."""
    library = folder / "faults.so"
    source = _HERE / "faults.c"
    built = [compiler() or "cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(built, check=True)
    # One thread each: a fork keeps none of the others.
    quiet = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | quiet | {"LD_PRELOAD": str(library), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(_HERE / "fault_server.py")], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
    )  # fmt: skip
    try:
        yield Server(process, folder / "said")
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
