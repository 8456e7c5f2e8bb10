"""The folder in which an output is made: ``.NAME.partial`` beside its place.

It is made by us, readable for nobody else, marked by a file and locked while a run writes. A link,
a file or a folder of somebody else's that has its name is refused and left alone; what a killed run
of ours left is recognised by the mark and taken over. Anybody may remove or rename the folder
between opening and locking it, so after locking it must still be the one that has the name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantcli import systems
from quantcli.errors import OutputError

MARK = ".quantcli"
"""A file in the folder, by which it is known as ours."""

SHARED = "shared-"
"""What the names begin with that several processes make there together."""
MEETING = SHARED + "meeting"
"""Where they meet: see `quantcli.ranks.meeting`."""
HELD = ".partial-output"
"""What the name of a folder ends with in which a file is filled by several runs in turn."""
REPLACED = "replaced"
"""What a folder that is replaced is called meanwhile."""

_ATTEMPTS = 100
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def partial_path(path: Path) -> Path:
    """The folder in which the file or folder ``path`` is made."""
    return path.with_name(f".{path.name}.partial")


def held_path(path: Path) -> Path:
    """The folder in which the file ``path`` is filled by several runs in turn."""
    return path.with_name(f".{path.name}{HELD}")


def held_bytes(paths: Iterable[Path]) -> int:
    """Bytes of the disk that what is left of earlier runs for ``paths``, or others' work, takes."""
    blocks = 0
    for path in paths:
        for ours in (partial_path(path), held_path(path)):
            for folder, _, names in os.walk(ours):
                for name in names:
                    with suppress(OSError):
                        found = os.lstat(Path(folder, name))
                        blocks += getattr(found, "st_blocks", -(-found.st_size // 512))
    return 512 * blocks


@dataclass(frozen=True, slots=True)
class Staging:
    """A folder that is ours; ``descriptor`` holds its lock."""

    folder: Path
    descriptor: int

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove everything but the mark and ``keep``; links go, what they point to stays."""
        _clear(self.folder, keep)

    def leave(self) -> None:
        """Leave the folder to others who share it, and give the lock back."""
        os.close(self.descriptor)

    def remove(self) -> None:
        """Remove the folder, as far as the disk lets us, and give its lock back."""
        if systems.DIRECTORY is None:
            # The mark is what is open, and Windows removes no open file.
            with suppress(OSError):
                _clear(self.folder)
            os.close(self.descriptor)
            _remove(self.folder)
            return
        try:
            _remove(self.folder)
        finally:
            os.close(self.descriptor)


def claim(path: Path, *, shared: bool = False) -> Staging:
    """The folder in which ``path`` can be made, locked; what a killed run left is still in it.

    OutputError while another run writes there, and for anything of that name that is not ours.
    With ``shared`` other processes that share it may be there, but nobody who does not.
    """
    folder = partial_path(path)
    for _ in range(_ATTEMPTS):
        try:
            made = _make(folder)
            descriptor = _open(folder, made=made)
        except FileNotFoundError:
            # Removed meanwhile by the run that had it, or the parent folder is gone.
            if folder.parent.is_dir():
                continue
            raise OutputError(f"the folder {folder.parent} does not exist") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _foreign(folder) from error
            raise output_error(path, error) from error
        try:
            _lock(descriptor, folder, path, made=made, shared=shared)
            if not _is_named(descriptor, folder):
                os.close(descriptor)
                continue
            _mark(descriptor, folder, made=made, shared=shared)
        except OutputError:
            os.close(descriptor)
            raise
        except OSError as error:
            if made:
                _unmake(folder)
            os.close(descriptor)
            raise output_error(path, error) from error
        return Staging(folder, descriptor)
    raise OutputError(f"other runs write {path} again and again", hint="wait for them or use -o")


def remove_left(path: Path) -> None:
    """Remove the folder in which ``path``, which is whole, was made, if a kill has left it."""
    if partial_path(path).is_dir():
        with suppress(OutputError):
            claim(path).remove()


def shared_names(name: str | None) -> tuple[str, ...]:
    """What a process that shares the folder leaves there: what is made, and where all meet."""
    return () if name is None else (name, MEETING, REPLACED)


def log_name(name: str) -> str:
    """What the log of ``name``, which a run that was stopped has left, is called."""
    return f"{name}.log"


def own_folder(folder: Path, *, empty: bool) -> None:
    """Make a folder for the work of a run, or take over what an earlier one of ours left there.

    ``empty`` clears it. OutputError for a link, a file or somebody else's folder of that name.
    """
    try:
        made = _make(folder)
        descriptor = _open(folder, made=made)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _foreign(folder) from error
        raise output_error(folder, error) from error
    try:
        _mark(descriptor, folder, made=made)
        if empty:
            _clear(folder)
    except OutputError:
        raise
    except OSError as error:
        if made:
            _unmake(folder)
        raise output_error(folder, error) from error
    finally:
        os.close(descriptor)


def remove_own(folder: Path) -> None:
    """Remove a folder of `own_folder`, as far as the disk lets us; what is not ours stays."""
    if folder.is_symlink():
        return
    if (folder / MARK).is_file():
        _remove(folder)
        return
    # A kill may have come between its mark and itself.
    with suppress(OSError):
        folder.rmdir()


def _open(folder: Path, *, made: bool) -> int:
    """The folder opened; where that cannot be done, its mark, which holds the lock instead.

    OutputError for what is not ours, as far as it is seen here.
    """
    if systems.DIRECTORY is not None:
        flags = os.O_RDONLY | systems.DIRECTORY | systems.NOFOLLOW | systems.CLOEXEC
        return os.open(folder, flags)
    if folder.is_symlink() or not folder.is_dir():
        raise _foreign(folder)
    names = [path.name for path in folder.iterdir()]
    if not made and names and MARK not in names:
        raise _foreign(folder)
    return os.open(folder / MARK, os.O_RDWR | os.O_CREAT | systems.CLOEXEC, 0o600)


def _clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything but the mark; links go, what they point to stays."""
    for path in folder.iterdir():
        if path.name == MARK or path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(folder: Path) -> None:
    """Remove a folder of ours, as far as the disk lets us.

    Its mark goes last: what a kill leaves of it is still known as ours.
    """
    with suppress(OSError):
        _clear(folder)
        (folder / MARK).unlink()
        folder.rmdir()


def _make(folder: Path) -> bool:
    """Make the folder; returns False where something has its name."""
    try:
        folder.mkdir(0o700)
    except FileExistsError:
        return False
    return True


def _unmake(folder: Path) -> None:
    """Remove a folder that was made and could not be marked."""
    with suppress(OSError):
        folder.rmdir()


def _lock(descriptor: int, folder: Path, path: Path, *, made: bool, shared: bool) -> None:
    try:
        systems.lock(descriptor, shared=shared)
    except BlockingIOError as error:
        raise OutputError(
            f"another run is writing {path} at this moment", hint="wait for it or use -o"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # Whoever made the folder has it; those who share it know it by what lies there.
        if not made and not (shared and _is_shared(folder)):
            raise OutputError(
                f"{folder} is there, and its filesystem has no locks that would tell whether a "
                f"run is writing it ({error.strerror})",
                hint="remove it if none is, or choose another name with -o",
            ) from error


def _is_shared(folder: Path) -> bool:
    """Whether the folder holds nothing that one run alone would have made."""
    return all(path.name.startswith((SHARED, MARK, REPLACED)) for path in folder.iterdir())


def _is_named(descriptor: int, folder: Path) -> bool:
    """Whether the open folder still has its name."""
    held = os.fstat(descriptor)
    try:
        named = os.lstat(folder if systems.DIRECTORY is not None else folder / MARK)
    except FileNotFoundError:
        return False
    return (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)


def _mark(descriptor: int, folder: Path, *, made: bool, shared: bool = False) -> None:
    """Mark the folder; OutputError where it was there and is not ours."""
    if systems.DIRECTORY is None:
        return  # it was marked to be opened
    if not made:
        names = os.listdir(descriptor)
        if os.fstat(descriptor).st_uid != systems.owner() or (names and MARK not in names):
            raise _foreign(folder)
        if names:
            return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | systems.NOFOLLOW | systems.CLOEXEC
    try:
        os.close(os.open(MARK, flags, 0o600, dir_fd=descriptor))
    except FileExistsError:
        # One of those that share it was quicker.
        if not shared:
            raise


def _foreign(folder: Path) -> OutputError:
    return OutputError(
        f"{folder} is not quantcli's, and the output is to be made in a folder of that name",
        hint="move it away, or choose another name with -o",
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What fails inside is said of the file ``path``, which the system's own error may not name."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise output_error(path, error) from error


def output_error(path: Path, error: OSError) -> OutputError:
    """What to say of a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path}: the disk is full", hint="free some space or choose another folder with -o"
        )
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{path}: {error.strerror}",
            hint="choose another disk with -o (FAT32 ends at 4 GB a file), write parts "
            "(--split-max-size 3G), or raise what 'ulimit -f' shows",
        )
    return OutputError(f"{path}: {error.strerror or error}")
