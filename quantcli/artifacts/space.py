"""Space for a file before a byte of it is written, so that a full disk shows at once.

``os.posix_fallocate`` will not do: on filesystems that cannot reserve space, glibc imitates it by
writing a byte into every block of 4 KiB, which takes as long as the file itself. So ``fallocate``
is called as the system has it. Where that cannot be done the file gets its size alone, and a full
disk shows at the write; what is to be mapped into memory is filled with zeros instead, since a
mapping has no error to return.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from typing import Any

from quantcli.systems import write_at

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_ZEROS = 1 << 20


def reserve(descriptor: int, size: int) -> bool:
    """Give an empty file ``size`` bytes; returns whether the disk has set them aside.

    OSError with ENOSPC where it has no room.
    """
    os.ftruncate(descriptor, size)
    if size == 0:
        return True
    number = _allocate(descriptor, size)
    if number == 0:
        return True
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number))


def fill(descriptor: int, size: int) -> None:
    """`reserve`, by writing zeros where the filesystem has no other way."""
    if reserve(descriptor, size):
        return
    zeros = bytes(_ZEROS)
    offset = 0
    while offset < size:
        offset += write_at(descriptor, zeros[: size - offset], offset)


def _allocate(descriptor: int, size: int) -> int:
    """The system's ``fallocate`` from the start of the file; returns its error number, 0 for none.

    ENOSYS on systems that have none.
    """
    function = _find()
    if function is None:
        return errno.ENOSYS
    while True:
        ctypes.set_errno(0)
        if function(descriptor, 0, 0, size) == 0:
            return 0
        if ctypes.get_errno() != errno.EINTR:
            return ctypes.get_errno()


@cache
def _find() -> Any:
    """``fallocate`` of the C library with 64-bit offsets, None where it has none."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except TypeError:  # Windows names no library for the process itself
        return None
    function = getattr(library, "fallocate64", None)
    if function is None and ctypes.sizeof(ctypes.c_long) == 8:
        function = getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        function.restype = ctypes.c_int
    return function
