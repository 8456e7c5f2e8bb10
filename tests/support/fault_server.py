"""Runs command lines in forked children, under the faults of faults.c, which is preloaded.

Python and all libraries are loaded once. Each line of standard input is a job in JSON: ``args`` of
`quantcli`, the ``prefix`` of paths and the ``spec`` of the fault, and the file ``log`` that takes
what is printed. The answer is the exit status, negative for a signal, and how many calls the fault
has counted.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

_shim = ctypes.CDLL(None)
_shim.faults_set.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
_shim.faults_count.restype = ctypes.c_long


def serve() -> None:
    from quantcli.cli.app import run

    for line in sys.stdin:
        job = json.loads(line)
        if job.get("warm"):
            # In this very process: what it loads, the children have.
            answer = {"code": _redirected(job, partial(run, job["args"])), "count": 0}
        else:
            answer = _fork(job)
        print(json.dumps(answer), flush=True)


def _redirected(job: dict[str, Any], work: Any) -> int:
    saved = [os.dup(1), os.dup(2)]
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        return int(work())
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for descriptor, number in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(log)


def _fork(job: dict[str, Any]) -> dict[str, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 70
        try:
            code = _redirected(job, lambda: _run(job, writer))
        except BaseException:
            with Path(job["log"]).open("a") as log:
                traceback.print_exc(file=log)
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return {"code": os.waitstatus_to_exitcode(status), "count": int(told or b"-1")}


def _run(job: dict[str, Any], writer: int) -> int:
    from quantcli.cli.app import run

    _shim.faults_set(os.fsencode(job["prefix"]), job["spec"].encode())
    code = run(job["args"])
    count = _shim.faults_count()
    _shim.faults_set(b"", b"")
    os.write(writer, str(count).encode())
    return code


if __name__ == "__main__":
    serve()
