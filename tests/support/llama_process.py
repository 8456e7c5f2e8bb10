"""llama.cpp in a process of its own, since a file that it does not expect may abort it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class LlamaProcess:
    """`support.llama_logits` by pipe; a process that died is started again for the next file."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def logits(self, path: Path, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token; AssertionError when llama.cpp refuses the file or dies."""
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        print(json.dumps([str(path), list(tokens)]), file=child.stdin, flush=True)
        answer = child.stdout.readline()
        if not answer:
            code = child.wait()
            raise AssertionError(f"llama.cpp died with status {code} on {path}")
        if answer.strip() != "ok":
            raise AssertionError(json.loads(answer))
        found: NDArray[np.float32] = np.load(f"{path}.npy")
        return found

    def close(self) -> None:
        """End the process."""
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
            self._child.wait()

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        return self._child


def _serve() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from support.llama_logits import llama_logits

    for line in sys.stdin:
        path, tokens = json.loads(line)
        try:
            np.save(f"{path}.npy", llama_logits(path, tokens))
        except AssertionError as error:
            print(json.dumps(str(error)), flush=True)
        else:
            print("ok", flush=True)


if __name__ == "__main__":
    _serve()
