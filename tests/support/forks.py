"""The command line as processes that are forked from one which has imported everything.

``python -m quantcli`` imports torch for seconds; twenty commands of a page would spend a minute on
it. `Forks` starts a server, which forks itself for each command. Its ``bin`` folder holds a
program ``quantcli`` that hands its arguments, folder, environment and open files to the server, so
that shell scripts run as they stand.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMPORTS = ("torch", "transformers", "llama_cpp", "quantcli.api.evaluate", "rich.progress")
_SHIM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    words = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(words).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(words)
    sys.exit(int.from_bytes(server.recv(1), "big"))
"""


class Forks:
    """The server; a context manager that ends it. ``environment`` is set before it imports."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._address = str(folder / "server")
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(self._address)
        listening.listen()
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(listening.fileno()), *IMPORTS],
            env=env, stdin=subprocess.DEVNULL, pass_fds=[listening.fileno()],
        )  # fmt: skip
        listening.close()
        self.bin = folder / "bin"
        self.bin.mkdir()
        program = self.bin / "quantcli"
        program.write_text(_SHIM.format(python=sys.executable, address=self._address))
        program.chmod(0o755)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.terminate()
        self._server.wait()

    def run(self, words: Sequence[str], folder: str, env: Mapping[str, str], stream: int) -> int:
        """The exit code of ``quantcli`` with these words; ``stream`` is all that it has open."""
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(self._address)
            asked = json.dumps([list(words), folder, dict(env)]).encode()
            socket.send_fds(server, [len(asked).to_bytes(8, "big")], [stream] * 3)
            server.sendall(asked)
            os.close(stream)
            return server.recv(1)[0]


def _serve(listening: socket.socket) -> None:
    while True:
        client, _ = listening.accept()
        if os.fork():
            client.close()
            # What has ended is not kept as a zombie.
            while _ended():
                pass
            continue
        length, files, _, _ = socket.recv_fds(client, 8, 3)
        asked = b""
        while len(asked) < int.from_bytes(length, "big"):
            asked += client.recv(1 << 16)
        child = os.fork()
        if child == 0:
            _become(files, *json.loads(asked))
        for file in files:
            os.close(file)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        client.sendall(bytes([code if code >= 0 else 128 - code]))
        os._exit(0)


def _ended() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def _become(files: list[int], words: list[str], folder: str, environment: dict[str, Any]) -> None:
    """In the child: the command itself, which never returns."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        mode = "rww"[number]
        name = ("stdin", "stdout", "stderr")[number]
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["quantcli", *words]
    from quantcli.cli.app import main

    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for _name in sys.argv[2:]:
        __import__(_name)
    _serve(socket.socket(fileno=int(sys.argv[1])))
