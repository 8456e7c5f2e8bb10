"""Arrays that are too large for memory, in files for the time of a run.

The file's space is taken before it is mapped: on a full disk a write into a mapping would end the
process with a signal, and no sentence could be said. What is read and written a part at a time is
better not mapped at all: pages of a mapping count as the process's memory until the system takes
them back.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from quantcli.artifacts.space import fill, reserve
from quantcli.artifacts.staging import naming, output_error
from quantcli.errors import OutputError
from quantcli.systems import BINARY, CLOEXEC, read_into, write_at

LARGE = 1 << 26
"""Bytes of a file from which on its pages are let go."""


def create_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Zeros in a new file at ``path``; OutputError where the disk has no room for them."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        with path.open("wb") as file:
            fill(file.fileno(), size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise output_error(path, error) from error
    return np.memmap(path, dtype, "r+", shape=shape)


def forget_pages(array: Any) -> None:
    """Let the memory of an array in a file go; what was written stays, and is read again."""
    mapped = getattr(array, "_mmap", None)
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if isinstance(mapped, mmap.mmap) and advice is not None and len(mapped) >= LARGE:
        mapped.madvise(advice)


class ArrayFile:
    """An array in a file of ``shape``, whose parts are read and written by their first indices.

    `create` makes it of zeros, `open` takes up one that is there. A part that was read is a copy.
    """

    def __init__(self, path: Path, dtype: DTypeLike, shape: tuple[int, ...], flags: int) -> None:
        self.path = path
        self.shape = shape
        self._dtype = np.dtype(dtype)
        self._file = os.open(path, flags | BINARY | CLOEXEC, 0o666)

    @classmethod
    def create(cls, path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> Self:
        """A new file; OutputError where the disk has no room for it."""
        with naming(path):
            made = cls(path, dtype, shape, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                reserve(made._file, math.prod(shape) * made._dtype.itemsize)
            except OSError:
                made.close()
                path.unlink(missing_ok=True)
                raise
        return made

    @classmethod
    def open(cls, path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> Self:
        """An earlier run's file, to be read."""
        with naming(path):
            return cls(path, dtype, shape, os.O_RDONLY)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: tuple[int, ...]) -> NDArray[Any]:
        part, offset = self._find(index)
        values = np.empty(part, self._dtype)
        view = values.data.cast("B")
        with naming(self.path):
            while view:
                count = read_into(self._file, view, offset)
                if not count:
                    raise OutputError(f"{self.path} is cut short", hint="--force starts anew")
                view, offset = view[count:], offset + count
        return values

    def __setitem__(self, index: tuple[int, ...], values: NDArray[Any]) -> None:
        part, offset = self._find(index)
        whole = np.ascontiguousarray(np.broadcast_to(values, part), self._dtype)
        view = whole.data.cast("B")
        with naming(self.path):
            while view:
                count = write_at(self._file, view, offset)
                view, offset = view[count:], offset + count

    def flush(self) -> None:
        """Everything that was written is on the disk."""
        with naming(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        """Release the file, which stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()

    def _find(self, index: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Shape and offset of a part."""
        depth = len(index)
        number = int(np.ravel_multi_index(index, self.shape[:depth])) if index else 0
        part = self.shape[depth:]
        return part, number * math.prod(part) * self._dtype.itemsize
