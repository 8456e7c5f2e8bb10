"""Positioned reads from one file: thread safe, and no page of it stays mapped.

``os.preadv`` fills a buffer of ours, so resident memory is what was asked for and nothing more;
a memory map would count every touched page of a checkpoint against the process. Also reads the
small JSON files that lie beside the weights.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.systems import BINARY, CLOEXEC, NONBLOCK, read_into
from quantcli.whole_files import read_whole

WEIGHT_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Stored float dtypes, by safetensors' and GGUF's common names, and NumPy's for them."""

_LFS_POINTER = b"version https://git-lfs"
_MOST_DIGITS = 300
_SHORT_ROW = 1 << 13
_CHUNK = 1 << 16
"""Rows of at most so many bytes are read whole, so many bytes at once."""
_PREAD_CAP = 1 << 30
"""Linux moves at most 2 GiB - 4 KiB in one call; ask for less and loop."""


class StoredFile:
    """An open file and its size; `read` and `fill` may be called from several threads."""

    is_remote = False
    """Whether every read is a request over the network."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
            self._descriptor = os.open(path, os.O_RDONLY | BINARY | CLOEXEC | NONBLOCK)
        except FileNotFoundError as error:
            raise SourceError(f"{path}: there is no such file") from error
        except OSError as error:
            raise SourceError(f"{path}: cannot be opened: {error.strerror}") from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise SourceError(f"{path}: is not a regular file")
        self.size = status.st_size

    def fill(self, target: NDArray[Any], offset: int) -> None:
        """Fill a C-contiguous array with the bytes at ``offset``; SourceError when they end."""
        view = target.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                got = read_into(self._descriptor, view[done : done + _PREAD_CAP], offset + done)
            except OSError as error:
                raise SourceError(
                    f"{self.path}: cannot be read at byte {offset + done}: {error.strerror}"
                ) from error
            if got == 0:
                raise SourceError(
                    f"{self.path}: ends at byte {offset + done}, {len(view) - done} bytes early",
                    hint="was it truncated while it was read?",
                )
            done += got

    def read(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes at ``offset``, or fewer where the file ends."""
        count = max(0, min(nbytes, self.size - offset))
        data = np.empty(count, dtype=np.uint8)
        self.fill(data, offset)
        return data.tobytes()

    def read_block(
        self,
        offset: int,
        dtype: np.dtype[Any],
        width: int,
        rows: tuple[int, int],
        columns: tuple[int, int] | None = None,
    ) -> NDArray[Any]:
        """A rectangle of a row-major matrix of ``width`` items a row that begins at ``offset``.

        Returns a new array of shape (rows, columns). Whole rows are one read; a range of columns
        is one read for each row, so that only the wanted bytes move. Short rows are read whole,
        many at once, and cut here, since a read costs more than their bytes do.
        """
        first, last = columns if columns is not None else (0, width)
        block = np.empty((rows[1] - rows[0], last - first), dtype=dtype)
        if block.size == 0:
            return block
        if last - first == width:
            self.fill(block, offset + rows[0] * width * dtype.itemsize)
            return block
        stride = width * dtype.itemsize
        if stride <= _SHORT_ROW:
            step = _CHUNK // stride
            for index in range(0, len(block), step):
                count = min(step, len(block) - index)
                whole = np.empty((count, width), dtype=dtype)
                self.fill(whole, offset + (rows[0] + index) * stride)
                block[index : index + count] = whole[:, first:last]
            return block
        for index, line in enumerate(block):
            place = (rows[0] + index) * width + first
            self.fill(line, offset + place * dtype.itemsize)
        return block

    def check_unchanged(self) -> None:
        """Of a file elsewhere, SourceError where it is no longer the one that was opened."""

    def hint_for_head(self, head: bytes) -> str | None:
        """What a file with these first bytes most likely is, when it is not what it should be."""
        if head.startswith(_LFS_POINTER[: max(len(head), 1)]) and self.size < 1024:
            return "it is a Git LFS pointer; fetch the weights with: git lfs pull"
        if head[:1] in (b"<",):
            return "it looks like a web page; was the download refused?"
        return None

    def close(self) -> None:
        """Release the descriptor; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def check_range(name: str, span: tuple[int, int], count: int) -> None:
    """IndexError unless ``span`` lies within ``0:count``; ``name`` is the tensor's."""
    if not 0 <= span[0] <= span[1] <= count:
        raise IndexError(f"{name}: {span[0]}:{span[1]} is not within 0:{count}")


class _HugeIntegerError(ValueError):
    """An integer that no float holds."""


def _parse_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise _HugeIntegerError(f"an integer of {len(digits.lstrip('-'))} digits, {digits[:8]}...")
    return int(digits)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; SourceError when it is missing, broken or not an object."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise SourceError(f"{path}: holds a JSON {type(value).__name__} where an object belongs")
    return value


def read_json_value(path: Path) -> Any:
    """Whatever a JSON file holds; SourceError when it is missing or broken."""
    try:
        content = read_whole(path)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: there is no such file") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return json.loads(content.decode("utf-8"), parse_int=_parse_int)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is not UTF-8 at byte {error.start}") from error
    except _HugeIntegerError as error:
        raise SourceError(f"{path}: holds {error}, which is beyond every number type") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not JSON: {error}") from error
