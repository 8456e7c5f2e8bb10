"""Files that appear under their final name only when they are whole.

Each file is written as ``.NAME.partial`` in the target's folder, at its full size from the start
so that a full disk shows at once, and renamed after its data have reached the disk. The partial
file is locked while it is written: a second run for the same target is refused, and what a killed
run left behind is taken over by the next one instead of piling up. A thread sends what has been
written to the disk on the way, so that little is left to wait for at the end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from quantcli.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_FLUSH_BYTES = 64 << 20
"""Written bytes after which a file is sent to the disk."""


def partial_path(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


def refuse_existing(paths: Sequence[Path], *, force: bool) -> None:
    """OutputError when a target exists (unless ``force``) or its folder cannot take a file."""
    for path in paths:
        if path.is_dir():
            raise OutputError(f"{path} is a folder", hint="name a file with -o FILE.gguf")
        if path.exists() and not force:
            raise OutputError(f"{path} exists already", hint="--force replaces it")
        refuse_parent(path.parent)


def refuse_parent(folder: Path) -> None:
    """OutputError when ``folder`` cannot take a file."""
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist", hint="create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} cannot be written to")


def open_locked(partial: Path, flags: int, path: Path) -> int:
    """A descriptor of ``partial``, which no other run holds; OutputError when one does.

    ``path`` is what it will be called.
    """
    try:
        descriptor = os.open(partial, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise OutputError(
            f"another run is writing {path} at this moment", hint="wait for it or use -o"
        ) from error
    return descriptor


class AtomicFiles:
    """A set of files written at random offsets and published together.

    A context manager: leaving it without `publish` removes what was written. `write` may be
    called from several threads.
    """

    def __init__(self, sizes: dict[Path, int], *, force: bool = False) -> None:
        self._sizes = sizes
        self._force = force
        self._open: dict[Path, int] = {}
        self._unsent = dict.fromkeys(sizes, 0)
        self._lock = threading.Lock()
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushes: dict[Path, Future[None]] = {}
        self._published = False

    def __enter__(self) -> Self:
        refuse_existing(list(self._sizes), force=self._force)
        try:
            for path, size in self._sizes.items():
                self._create(path, size)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._published:
            self._discard()

    def write(self, path: Path, offset: int, data: ReadableBuffer) -> None:
        """Put ``data`` at ``offset`` of the file that will be ``path``."""
        view = memoryview(data).cast("B")
        try:
            while view:
                written = os.pwrite(self._open[path], view, offset)
                view, offset = view[written:], offset + written
                self._count(path, written)
        except OSError as error:
            raise output_error(path, error) from error

    def _count(self, path: Path, written: int) -> None:
        """Begin to send a file's data to the disk when it is time and no flush is under way.

        Raises the OSError of the flush before: the system reports a lost write only once.
        """
        with self._lock:
            self._unsent[path] += written
            before = self._flushes.get(path)
            if self._unsent[path] < _FLUSH_BYTES or (before is not None and not before.done()):
                return
            if before is not None:
                before.result()
            self._unsent[path] = 0
            self._flushes[path] = self._flusher.submit(os.fsync, self._open[path])

    def publish(self) -> None:
        """Flush every file to the disk, then give each its final name."""
        try:
            for flush in self._flushes.values():
                flush.result()
            for descriptor in self._open.values():
                os.fsync(descriptor)
            refuse_existing(list(self._sizes), force=self._force)
            for path in self._sizes:
                partial_path(path).replace(path)
            self._published = True
            for folder in {path.parent for path in self._sizes}:
                _flush_folder(folder)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise output_error(next(iter(self._sizes)), error) from error
        self._close()

    def _create(self, path: Path, size: int) -> None:
        descriptor = open_locked(partial_path(path), os.O_RDWR | os.O_CREAT, path)
        self._open[path] = descriptor
        try:
            os.ftruncate(descriptor, 0)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.ftruncate(descriptor, size)
        except OSError as error:
            raise output_error(path, error) from error

    def _discard(self) -> None:
        for path in self._open:
            partial_path(path).unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._flusher.shutdown(cancel_futures=True)
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}


def write_file(path: Path, content: bytes, *, force: bool) -> None:
    """Write a whole file; OutputError when it exists, unless ``force``."""
    with AtomicFiles({path: len(content)}, force=force) as files:
        files.write(path, 0, content)
        files.publish()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_error(path: Path, error: OSError) -> OutputError:
    """What to say of a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path}: the disk is full", hint="free some space or choose another folder with -o"
        )
    return OutputError(f"{path}: {error.strerror or error}")
