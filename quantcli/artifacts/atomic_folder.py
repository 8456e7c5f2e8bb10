"""A model folder that appears whole or not at all.

It is filled in a folder of our own beside the target (see `quantcli.artifacts.staging`), every file
at its full size from the start, and renamed at the end. An existing folder is replaced only when
asked and only when quantcli wrote it, which its manifest tells; it is moved into our folder first
and removed last, and comes back where a run was killed between.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from quantcli.artifacts.atomic import (
    AtomicFiles,
    Stamps,
    is_interrupt,
    refuse_node,
    refuse_parent,
)
from quantcli.artifacts.staging import (
    REPLACED,
    Staging,
    claim,
    log_name,
    output_error,
    partial_path,
    shared_names,
)
from quantcli.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MANIFEST = "quantcli.json"


def refuse_folder(path: Path, *, force: bool) -> None:
    """OutputError when ``path`` exists (unless it may be replaced) or cannot be made."""
    refuse_node(path)
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
        self._sizes = sizes
        self._shared = False
        self._stays: str | None = None
        self._found: tuple[str, ...] = ()
        self._put_into("files")
        self._staging: Staging | None = None

    def _put_into(self, name: str) -> None:
        self._files_in = partial_path(self._path) / name
        self._files = AtomicFiles(
            {self._files_in / name: size for name, size in self._sizes.items()},
            force=self._stays is not None, fresh=True,
        )  # fmt: skip

    def share(self, name: str) -> None:
        """As that of `AtomicFiles`."""
        self._shared, self._stays, self._found = True, name, shared_names(name)
        self._put_into(name)
        self._files.share(name)

    def keep(self, name: str, *, resume: bool) -> None:
        """As that of `AtomicFiles`."""
        self._stays = name
        self._found = (name, log_name(name)) if resume else ()
        self._put_into(name)
        self._files.keep(name, resume=resume)

    @property
    def log_path(self) -> Path:
        """As that of `AtomicFiles`."""
        return partial_path(self._path) / log_name(self._stays or "files")

    def __enter__(self) -> Self:
        refuse_folder(self._path, force=self._force)
        self._staging = claim(self._path, shared=self._shared)
        try:
            if not self._shared:
                self._bring_back(self._staging.folder / REPLACED)
            refuse_folder(self._path, force=self._force)
            self._staging.clear(keep=self._found)
            self._files_in.mkdir(exist_ok=bool(self._found))
            self._files.__enter__()
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError) and not isinstance(error, OutputError):
                raise output_error(self._path, error) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.__exit__(kind, error, trace)
        self._discard(keep=is_interrupt(kind))

    def write(self, name: str, offset: int, data: ReadableBuffer) -> None:
        """Put ``data`` at ``offset`` of the file ``name``; from any thread."""
        self._files.write(self._files_in / name, offset, data)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """What lies at ``offset`` of the file ``name``, less where it ends before."""
        return self._files.read(self._files_in / name, offset, length)

    def flush(self) -> Stamps:
        """Flush every file to the disk; returns what the folder is known by: its manifest."""
        return {self._path.name: self._files.flush()[MANIFEST]}

    def publish(self) -> None:
        """Flush every file to the disk, then give the folder its name."""
        self._files.publish()
        aside = partial_path(self._path) / REPLACED
        # What a publisher before us moved, and was killed.
        self._bring_back(aside)
        refuse_folder(self._path, force=self._force)
        try:
            if self._path.exists():
                self._path.rename(aside)
            try:
                self._files_in.rename(self._path)
            except OSError:
                self._bring_back(aside)
                raise
        except OSError as error:
            raise output_error(self._path, error) from error
        self._discard()

    def _bring_back(self, aside: Path) -> None:
        """Put a folder that was moved aside, if there is one, where it was."""
        if aside.is_dir() and not self._path.exists():
            aside.rename(self._path)

    def _discard(self, *, keep: bool = False) -> None:
        if self._staging is not None:
            if self._shared or (keep and self._stays):
                self._staging.leave()
            else:
                self._staging.remove()
            self._staging = None
