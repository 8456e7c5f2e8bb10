"""A model folder that appears whole or not at all.

It is filled as ``.NAME.partial`` beside the target, every file at its full size from the start,
and renamed at the end. An existing folder is replaced only when asked and only when quantcli wrote
it, which its manifest tells; it is moved aside first and removed last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from quantcli.artifacts.atomic import (
    AtomicFiles,
    open_locked,
    output_error,
    partial_path,
    refuse_parent,
)
from quantcli.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MANIFEST = "quantcli.json"


def refuse_folder(path: Path, *, force: bool) -> None:
    """OutputError when ``path`` exists (unless it may be replaced) or cannot be made."""
    if path.is_symlink() or path.exists():
        if not force:
            raise OutputError(f"{path} exists already", hint="--force replaces it")
        if path.is_symlink() or not (path / MANIFEST).is_file():
            raise OutputError(
                f"{path} is not a folder that quantcli wrote, so it is not replaced",
                hint="remove it, or choose another name with -o",
            )
    refuse_parent(path.absolute().parent)


class AtomicFolder:
    """A folder of files of known sizes; a context manager like `AtomicFiles`."""

    def __init__(self, path: Path, sizes: Mapping[str, int], *, force: bool = False) -> None:
        self._path = path
        self._force = force
        self._partial = partial_path(path)
        self._files = AtomicFiles({self._partial / name: size for name, size in sizes.items()})
        self._lock: int | None = None

    def __enter__(self) -> Self:
        refuse_folder(self._path, force=self._force)
        try:
            self._partial.mkdir(exist_ok=True)
        except OSError as error:
            raise output_error(self._partial, error) from error
        self._lock = open_locked(self._partial, os.O_RDONLY, self._path)
        try:
            # What a killed run left.
            for entry in self._partial.iterdir():
                entry.unlink()
            self._files.__enter__()
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
        self._files.__exit__(kind, error, trace)
        if self._lock is not None:
            self._discard()

    def write(self, name: str, offset: int, data: ReadableBuffer) -> None:
        """Put ``data`` at ``offset`` of the file ``name``; from any thread."""
        self._files.write(self._partial / name, offset, data)

    def publish(self) -> None:
        """Flush every file to the disk, then give the folder its name."""
        self._files.publish()
        refuse_folder(self._path, force=self._force)
        aside = self._path.with_name(f".{self._path.name}.replaced")
        try:
            if self._path.exists():
                shutil.rmtree(aside, ignore_errors=True)
                self._path.rename(aside)
            try:
                self._partial.rename(self._path)
            except OSError:
                if aside.exists():
                    aside.rename(self._path)
                raise
        except OSError as error:
            raise output_error(self._path, error) from error
        shutil.rmtree(aside, ignore_errors=True)
        self._unlock()

    def _discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
