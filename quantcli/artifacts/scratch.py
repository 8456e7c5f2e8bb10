"""Arrays that are too large for memory, in files for the time of a run.

The file's space is taken before it is mapped: on a full disk a write into a mapping would end the
process with a signal, and no sentence could be said.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from quantcli.artifacts.space import fill
from quantcli.artifacts.staging import output_error

_LARGE = 1 << 26
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
    if isinstance(mapped, mmap.mmap) and advice is not None and len(mapped) >= _LARGE:
        mapped.madvise(advice)
