"""Work on what a stranger wrote, in a child process with a limit of time and one of memory.

Some of what files hold is a program: a regular expression, a chat template. It may be written to
run for ever or to take all memory, and neither can be told beforehand nor stopped from within.
Question and answer are JSON, so that nothing but data comes back.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from typing import Any

_CHILD = "from quantcli.bounded import serve; serve()"


class BoundError(Exception):
    """The work took longer or more memory than it may, or did not end well."""


def call_bounded(function: str, argument: Any, *, seconds: float, memory: int) -> Any:
    """What ``function`` ("module:name") returns for ``argument``, both of them JSON's types.

    ``memory`` is the child's whole address space in bytes. BoundError when it does not answer.
    """
    paths = [path for path in sys.path if path]
    question = {
        "function": function, "argument": argument, "seconds": seconds, "memory": memory,
    }  # fmt: skip
    try:
        done = subprocess.run(
            # -P: no module is taken from the current folder, which may be the stranger's.
            [sys.executable, "-P", "-c", _CHILD],
            input=json.dumps(question).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            check=True,
        )
        return json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise BoundError(str(error)) from error


def serve() -> None:
    """The child's part: answer the question on standard input."""
    question = json.load(sys.stdin)
    try:
        import resource
    except ImportError:
        # Windows has no such limits; the parent's patience is one.
        pass
    else:
        # Should the parent be killed, the child still ends.
        seconds = math.ceil(question["seconds"])
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (question["memory"], question["memory"]))
    module, _, name = question["function"].partition(":")
    answer = getattr(import_module(module), name)(question["argument"])
    json.dump(answer, sys.stdout)
