"""Files that appear under their final name only when they are whole.

Each file is written in a folder of our own beside its place (see `quantcli.artifacts.staging`), at
its full size from the start so that a full disk shows at once, and renamed after its data have
reached the disk. A second run for the same target is refused, and what a killed run left behind is
cleared away by the next one instead of piling up. A thread sends what has been written to the disk
on the way, so that little is left to wait for at the end.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from quantcli.artifacts.space import reserve
from quantcli.artifacts.staging import Staging, claim, log_name, output_error, shared_names
from quantcli.errors import InterruptedRunError, OutputError, UsageError
from quantcli.systems import BINARY, CLOEXEC, NOFOLLOW, flush_folder, read_at, write_at

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_FLUSH_BYTES = 64 << 20
"""Written bytes after which a file is sent to the disk."""

_NODES = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}
_PROC = Path("/proc")


Stamps = dict[str, list[int]]
"""Size in bytes and date in nanoseconds of each file by its name."""


def stamp(path: Path) -> list[int]:
    """Size and date of a file; [0, 0] where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return [0, 0]
    return [facts.st_size, facts.st_mtime_ns]


def refuse_existing(paths: Sequence[Path], *, force: bool) -> None:
    """OutputError when a target exists (unless ``force``) or its folder cannot take a file.

    What exists and is no regular file is never replaced.
    """
    for path in paths:
        refuse_node(path)
        if path.is_dir():
            raise OutputError(f"{path} is a folder", hint="name a file with -o FILE.gguf")
        if (path.exists() or path.is_symlink()) and not force:
            raise OutputError(f"{path} exists already", hint="--force replaces it")
        refuse_parent(path.parent)


def refuse_node(path: Path) -> None:
    """OutputError for a device, a FIFO or a socket, a link to one, and for standard output."""
    hint = "name a file with -o, which can be copied when it is whole"
    if str(path) == "-" or _is_stream(path):
        raise OutputError(f"{path}: outputs are not written to a stream", hint=hint)
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return
    if kind in _NODES:
        raise OutputError(f"{path} is {_NODES[kind]}, not a file, so it is not replaced", hint=hint)


def _is_stream(path: Path) -> bool:
    """Whether the path is an open file's other name, such as /dev/stdout or /dev/fd/1."""
    try:
        target = path.parent / path.readlink()
    except OSError:
        return False
    return any(_PROC in (place.parent, *place.parent.resolve().parents) for place in (path, target))


def refuse_own(paths: Iterable[Path], read: Iterable[Path]) -> None:
    """UsageError for a target that is one of the files that are read."""
    own = {path.resolve() for path in read}
    for path in paths:
        if path.resolve() in own:
            raise UsageError(
                f"{path} would be written over the file that is read",
                hint="name another one with -o",
            )


def refuse_parent(folder: Path) -> None:
    """OutputError when ``folder`` cannot take a file."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, not a folder", hint="name another one with -o")
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist", hint="create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} cannot be written to")


class AtomicFiles:
    """A set of files written at random offsets and published together.

    A context manager: leaving it without `publish` removes what was written. `write` may be
    called from several threads. With ``fresh`` the files' folder is new and ours, so that they are
    written under their own names. Files that are ``held`` are there already, where it says, at
    their full size: they are gone on with, and stay there where they are not published.
    """

    def __init__(
        self, sizes: dict[Path, int], *, force: bool = False, fresh: bool = False,
        held: Mapping[Path, Path] | None = None,
    ) -> None:  # fmt: skip
        self._sizes = sizes
        self._force = force
        self._fresh = fresh
        self._held = held or {}
        self._staged: dict[Path, Staging] = {}
        self._open: dict[Path, int] = {}
        self._unsent = dict.fromkeys(sizes, 0)
        self._lock = threading.Lock()
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushes: dict[Path, Future[None]] = {}
        self._published = False
        self._shared = False
        self._stays: str | None = None
        """What the content is called, where it may stay when this is left."""
        self._found: tuple[str, ...] = ()
        """What is not cleared away."""

    def share(self, name: str) -> None:
        """Before it is entered: other processes write parts of the same files, which stay.

        ``name`` is what they are called meanwhile, which all have in common. What one of them
        leaves without `publish` the others, or it when it is run again, go on with; what `publish`
        leaves besides the files is the caller's to remove.
        """
        self._shared, self._stays, self._found = True, name, shared_names(name)

    def keep(self, name: str, *, resume: bool) -> None:
        """Before it is entered: what is written stays, called ``name``, if an interrupt ends this.

        With ``resume`` what an earlier run has left under that name is there again, and its log.
        """
        self._stays = name
        self._found = (name, log_name(name)) if resume else ()

    @property
    def log_path(self) -> Path:
        """A file beside the first one's content, for what is to be known of it."""
        staging, name = next(iter(self._staged.values())), self._stays or "file"
        return staging.folder / log_name(name)

    def __enter__(self) -> Self:
        refuse_existing(list(self._sizes), force=self._force)
        try:
            if not self._fresh:
                for path in self._sizes:
                    self._staged[path] = claim(path, shared=self._shared)
                    self._staged[path].clear(keep=self._found)
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
            self._discard(keep=is_interrupt(kind))

    def write(self, path: Path, offset: int, data: ReadableBuffer) -> None:
        """Put ``data`` at ``offset`` of the file that will be ``path``."""
        whole = memoryview(data)
        # An empty array has a shape that cannot be cast.
        view = whole.cast("B") if whole.nbytes else memoryview(b"")
        try:
            while view:
                written = write_at(self._open[path], view, offset)
                view, offset = view[written:], offset + written
                self._count(path, written)
        except OSError as error:
            raise output_error(path, error) from error

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """What lies at ``offset`` of the file that will be ``path``, less where it ends before."""
        try:
            return read_at(self._open[path], length, offset)
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

    def flush(self) -> Stamps:
        """Flush every file to the disk; returns what it is known by when it has its name."""
        try:
            for flush in self._flushes.values():
                flush.result()
            for descriptor in self._open.values():
                os.fsync(descriptor)
            return {path.name: stamp(self._place(path)) for path in self._sizes}
        except OSError as error:
            raise output_error(next(iter(self._sizes)), error) from error

    def publish(self) -> None:
        """Flush every file to the disk, then give each its final name."""
        self.flush()
        try:
            # Windows renames no open file.
            self._release()
            self._rename()
            self._published = True
            for folder in {path.parent for path in self._sizes}:
                flush_folder(folder)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise output_error(next(iter(self._sizes)), error) from error
        self._close()

    def _rename(self) -> None:
        """Give the files their names, the first one's last.

        Of several that replace others the first goes away before, so that whatever stops us leaves
        no mixture of old and new that could be read: without the first there is no set.
        """
        if self._fresh:
            return
        refuse_existing(list(self._sizes), force=self._force)
        first, *others = self._sizes
        if others:
            first.unlink(missing_ok=True)
        for path in (*others, first):
            self._place(path).replace(path)

    def _place(self, path: Path) -> Path:
        """Where the file is written until it is whole."""
        if path in self._held:
            return self._held[path]
        return path if self._fresh else self._staged[path].folder / (self._stays or "file")

    def _create(self, path: Path, size: int) -> None:
        held = path in self._held
        alone = 0 if self._stays else os.O_EXCL
        flags = 0 if held else os.O_CREAT | alone
        flags |= os.O_RDWR | BINARY | NOFOLLOW | CLOEXEC
        try:
            self._open[path] = os.open(self._place(path), flags, 0o666)
            if not held:
                reserve(self._open[path], size)
        except OSError as error:
            raise output_error(path, error) from error

    def _discard(self, *, keep: bool = False) -> None:
        if self._fresh and not self._stays:
            for path in self._open:
                path.unlink(missing_ok=True)
        self._close(keep=keep and self._stays is not None)

    def _release(self) -> None:
        """Close the files."""
        self._flusher.shutdown(cancel_futures=True)
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def _close(self, *, keep: bool = False) -> None:
        self._release()
        for staging in self._staged.values():
            if self._shared or keep:
                staging.leave()
            else:
                staging.remove()
        self._staged = {}


def is_interrupt(kind: type[BaseException] | None) -> bool:
    """Whether what ends a run is its user, who may go on with it later."""
    ends = (KeyboardInterrupt, GeneratorExit, InterruptedRunError)
    return kind is not None and issubclass(kind, ends)


def write_file(path: Path, content: bytes, *, force: bool) -> None:
    """Write a whole file; OutputError when it exists, unless ``force``."""
    with AtomicFiles({path: len(content)}, force=force) as files:
        files.write(path, 0, content)
        files.publish()
