"""Hidden states of all windows, between one layer and the next, or of every layer for a way back.

A `HiddenStateCache` has those of one layer, in memory or, where they are larger than what may be
used, in a file from which one window is read at a time. Either way a finished layer's states are
written to one of two files in turn, never over those of the layer before: whenever the process
ends, one of them is whole.
`LayerInputs` keeps the input of every layer, where gradients are to go backwards afterwards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.artifacts.scratch import ArrayFile
from quantcli.artifacts.staging import naming
from quantcli.errors import SourceError
from quantcli.systems import BINARY, write_at


class HiddenStates(Protocol):
    """What a walk keeps between layers; a window's states have shape (1, tokens, size)."""

    def get(self, index: int) -> torch.Tensor:
        """Window ``index`` as the layer before left it."""

    def get_next(self, index: int) -> torch.Tensor:
        """Window ``index`` after this layer, once it was put in."""

    def put(self, index: int, hidden: torch.Tensor) -> None:
        """Window ``index`` after this layer."""

    def turn_over(self) -> None:
        """All windows were put in: `get` gives these from now on."""


@dataclass(frozen=True)
class WindowsOfRank:
    """The windows that a rank runs, by their ``numbers`` among the ``total`` of all ranks."""

    numbers: tuple[int, ...]
    total: int


class HiddenStateCache:
    """Hidden states of shape (windows, tokens, size) and one dtype; ``turn`` is 0 or 1.

    They are in memory without a ``folder`` or where they take at most ``max_memory`` bytes, else in
    files there. The files hold the windows of all ranks, of which these are those ``of`` one.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None = None, *,
        max_memory: int = 0, turn: int = 0, of: WindowsOfRank | None = None,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._shape = shape
        self._dtype = dtype
        self._window: int = shape[1] * shape[2] * dtype.itemsize
        self.nbytes = shape[0] * self._window
        self._of = of
        self.in_memory = folder is None or self.nbytes <= max_memory
        self._memory = torch.empty(shape, dtype=dtype) if self.in_memory else None
        self.turn = turn
        self._next: int | None = None

    def load(self) -> None:
        """Continue with the states of an earlier run. SourceError when the file is not whole."""
        path = self._path(self.turn)
        whole = self.nbytes if self._of is None else self._of.total * self._window
        if not path.is_file() or path.stat().st_size != whole:
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
        else:
            if self._next is None:
                # Not before: until then the file may be the one that a run goes on from.
                self._next = self._open_next()
            with naming(self._path(1 - self.turn)):
                _write_all(self._next, _bytes(value), self._offset(index))

    def turn_over(self) -> None:
        """All windows were put in: `get` gives these from now on."""
        if self._memory is None:
            self.close()
            self.turn = 1 - self.turn

    def commit(self) -> int:
        """All windows are through this layer: make that the state to continue from."""
        if self._memory is not None:
            self._next = self._open_next()
            with naming(self._path(1 - self.turn)):
                for index, value in enumerate(self._memory):
                    _write_all(self._next, _bytes(value), self._offset(index))
                os.fsync(self._next)
            self.close()
            self.turn = 1 - self.turn
        elif self._next is not None:
            with naming(self._path(1 - self.turn)):
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
            self._path(turn), np.uint8, count=self._window, offset=self._offset(index)
        )
        return torch.from_numpy(raw).view(self._dtype).view(self._shape[1:])

    def _open_next(self) -> int:
        path = self._path(1 - self.turn)
        # Other ranks may have written theirs.
        anew = os.O_TRUNC if self._of is None else 0
        with naming(path):
            return os.open(path, os.O_WRONLY | os.O_CREAT | anew | BINARY, 0o666)

    def _offset(self, index: int) -> int:
        return self._window * (index if self._of is None else self._of.numbers[index])

    def _path(self, turn: int) -> Path:
        if self._folder is None:
            raise ValueError("these hidden states are in memory alone")
        return self._folder / f"hidden-{turn}.bin"


class LayerInputs:
    """The input of each layer and the output of the last, in ``values``; later their gradients.

    Values are float32 of shape (layers + 1, windows, tokens, size). On the way back gradients take
    the place of states, from the last to the first. With (1, windows, ...) only the present
    layer's are kept, and there is no way back. They may be in a file.
    """

    def __init__(self, values: NDArray[np.float32] | ArrayFile, dtype: torch.dtype) -> None:
        self.values = values
        self._dtype = dtype
        self._layer = -1

    def get(self, index: int) -> torch.Tensor:
        """Window ``index`` as the layer before left it, shape (1, tokens, size)."""
        return self._load(self._layer, index)

    def get_next(self, index: int) -> torch.Tensor:
        """Window ``index`` after this layer, or the gradient by it, shape (1, tokens, size)."""
        return self._load(self._layer + 1, index)

    def put(self, index: int, hidden: torch.Tensor) -> None:
        """Window ``index`` after this layer."""
        self.values[self._slot(self._layer + 1), index] = hidden[0].float().cpu().numpy()

    def replace(self, index: int, gradient: torch.Tensor) -> None:
        """The gradient by what `get` gives takes its place."""
        self.values[self._slot(self._layer), index] = gradient[0].float().cpu().numpy()

    def turn_over(self) -> None:
        """Go on to the next layer."""
        self._layer += 1

    def turn_back(self) -> None:
        """Go back to the layer before."""
        self._layer -= 1

    def _load(self, layer: int, index: int) -> torch.Tensor:
        # bfloat16 has no NumPy dtype; float32 holds it.
        values = np.array(self.values[self._slot(layer), index])
        return torch.from_numpy(values).unsqueeze(0).to(self._dtype)

    def _slot(self, layer: int) -> int:
        return min(layer, len(self.values) - 1)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write on where the system took a part; a disk without room refuses the rest."""
    while data:
        written = write_at(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _bytes(value: torch.Tensor) -> memoryview:
    return memoryview(value.contiguous().view(torch.uint8).numpy()).cast("B")
