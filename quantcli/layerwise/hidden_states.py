"""Hidden states of all windows, between one layer and the next.

They are held in memory or, where they are larger than what may be used, in a file from which one
window is read at a time. Either way a finished layer's states are written to one of two files in
turn, never over those of the layer before: whenever the process ends, one of them is whole.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from quantcli.errors import SourceError


class States:
    """Hidden states of shape (windows, tokens, size) and one dtype; ``turn`` is 0 or 1."""

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        in_memory: bool,
        turn: int = 0,
    ) -> None:
        self._folder = folder
        self._shape = shape
        self._dtype = dtype
        self._memory = torch.empty(shape, dtype=dtype) if in_memory else None
        self._window = shape[1] * shape[2] * dtype.itemsize
        self.turn = turn
        self._next = None if in_memory else self._open_next()

    def load(self) -> None:
        """Continue with the states of an earlier run. SourceError when the file is not whole."""
        path = self._path(self.turn)
        if not path.is_file() or path.stat().st_size != self._window * self._shape[0]:
            raise SourceError(f"{path} is missing or cut short", hint="--force starts anew")
        if self._memory is not None:
            for index in range(self._shape[0]):
                self._memory[index] = self._read(index, self.turn)

    def get(self, index: int) -> torch.Tensor:
        """Window ``index`` as the layer before left it, shape (1, tokens, size)."""
        found = self._memory[index] if self._memory is not None else self._read(index, self.turn)
        return found.unsqueeze(0)

    def get_next(self, index: int) -> torch.Tensor:
        """Window ``index`` after this layer, as it was put in and not yet committed."""
        found = (
            self._memory[index] if self._memory is not None else self._read(index, 1 - self.turn)
        )
        return found.unsqueeze(0)

    def put(self, index: int, hidden: torch.Tensor) -> None:
        """Window ``index`` after this layer; `get` of it may no longer be asked for."""
        value = hidden[0].to("cpu", self._dtype).contiguous()
        if self._memory is not None:
            self._memory[index] = value
        elif self._next is not None:
            os.pwrite(self._next, _bytes(value), index * self._window)

    def turn_over(self) -> None:
        """All windows were put in: `get` gives these from now on."""
        if self._memory is None:
            self.close()
            self.turn = 1 - self.turn
            self._next = self._open_next()

    def commit(self) -> int:
        """All windows are through this layer: make that the state to continue from."""
        if self._memory is not None:
            with self._path(1 - self.turn).open("wb") as file:
                for value in self._memory:
                    file.write(_bytes(value))
                file.flush()
                os.fsync(file.fileno())
            self.turn = 1 - self.turn
        elif self._next is not None:
            os.fsync(self._next)
            self.turn_over()
        return self.turn

    def close(self) -> None:
        """Release the file."""
        if self._next is not None:
            os.close(self._next)
            self._next = None

    def _read(self, index: int, turn: int) -> torch.Tensor:
        raw = np.fromfile(
            self._path(turn), np.uint8, count=self._window, offset=index * self._window
        )
        return torch.from_numpy(raw).view(self._dtype).view(self._shape[1:])

    def _open_next(self) -> int:
        path = self._path(1 - self.turn)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def _path(self, turn: int) -> Path:
        return self._folder / f"hidden-{turn}.bin"


def _bytes(value: torch.Tensor) -> memoryview:
    return memoryview(value.contiguous().view(torch.uint8).numpy()).cast("B")
