"""Small files read whole, whatever stands under their names.

A FIFO without a writer would wait for ever and a device never end; a file that grew beyond all
sense would fill the memory.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from quantcli.systems import BINARY, CLOEXEC, NONBLOCK

MOST_BYTES = 256 << 20
"""Far beyond every file of settings or vocabulary."""


def read_whole(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file; OSError also for other nodes and for more than ``most``."""
    descriptor = os.open(path, os.O_RDONLY | BINARY | CLOEXEC | NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it is larger than {most >> 10:,} KiB", str(path))
        return file.read()


def read_whole_text(path: Path, most: int = MOST_BYTES) -> str:
    """A UTF-8 text with every line end as a newline; OSError as above, UnicodeDecodeError."""
    return io.StringIO(read_whole(path, most).decode(), newline=None).read()
