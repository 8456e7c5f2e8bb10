"""What Windows has otherwise than POSIX: flags of ``open``, reads at an offset, locks, memory.

Everything is looked up when it is used for, so that importing works everywhere. Where a system has
no such thing, what stands in for it is said beside it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOEXEC: int = getattr(os, "O_CLOEXEC", 0) or getattr(os, "O_NOINHERIT", 0)
NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)
NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
BINARY: int = getattr(os, "O_BINARY", 0)
"""Without it Windows turns newlines into two bytes."""
DIRECTORY: int | None = getattr(os, "O_DIRECTORY", None)
"""None where a folder cannot be opened."""

_USUAL_MEMORY = 8 << 30
_place = threading.Lock()


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """`os.preadv` of one buffer: bytes read from ``offset`` on, 0 at the end."""
    preadv: Callable[..., int] | None = getattr(os, "preadv", None)
    if preadv is not None:
        return preadv(descriptor, [view], offset)
    data = read_at(descriptor, len(view), offset)
    view[: len(data)] = data
    return len(data)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """`os.pread`; elsewhere one thread at a time moves the file's own place."""
    pread: Callable[..., bytes] | None = getattr(os, "pread", None)
    if pread is not None:
        return pread(descriptor, length, offset)
    with _place:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)


def write_at(descriptor: int, data: Any, offset: int) -> int:
    """`os.pwrite`, with the same stand-in."""
    pwrite: Callable[..., int] | None = getattr(os, "pwrite", None)
    if pwrite is not None:
        return pwrite(descriptor, data, offset)
    with _place:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def lock(descriptor: int, *, shared: bool) -> None:
    """Lock an open file or folder for as long as it is open, without waiting.

    BlockingIOError where another process holds it, another OSError where there are no locks. On
    Windows a lock is never shared, and is of a byte behind the file's end.
    """
    try:
        import fcntl
    except ImportError:
        _lock_byte(descriptor)
    else:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _lock_byte(descriptor: int) -> None:
    try:
        import msvcrt
    except ImportError:
        import errno

        raise OSError(errno.ENOSYS, "this system has no locks") from None
    locking: Any = getattr(msvcrt, "locking")  # noqa: B009 - typeshed has it for Windows alone
    os.lseek(descriptor, 0, os.SEEK_END)
    try:
        locking(descriptor, getattr(msvcrt, "LK_NBLCK"), 1)  # noqa: B009
    except PermissionError as error:
        raise BlockingIOError(error.errno, error.strerror) from error


def owner() -> int | None:
    """The user whose files are ours; None where the system has no such numbers."""
    geteuid: Callable[[], int] | None = getattr(os, "geteuid", None)
    return None if geteuid is None else geteuid()


def flush_folder(folder: Path) -> None:
    """Bring names in a folder to the disk; Windows does so by itself."""
    if DIRECTORY is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def machine_memory() -> int:
    """Bytes of memory of the machine; 8 GiB where the system does not tell."""
    sysconf: Callable[[str], int] | None = getattr(os, "sysconf", None)
    if sysconf is not None:
        return sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES")
    return _ask_windows() or _USUAL_MEMORY


def _ask_windows() -> int | None:
    import ctypes

    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return None

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong), ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in (
                "total", "available", "page_total", "page_available", "virtual_total",
                "virtual_available", "extended",
            )),
        )  # fmt: skip

    status = Status()
    status.length = ctypes.sizeof(Status)
    if not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.total)


def resident_memory() -> int:
    """Resident bytes of this process now, their peak where only that is known, else 0."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
