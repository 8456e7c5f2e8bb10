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

from quantcli.artifacts.atomic import AtomicFiles, Stamps, refuse_node, refuse_parent
from quantcli.artifacts.staging import Staging, claim, output_error, partial_path
from quantcli.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MANIFEST = "quantcli.json"
_REPLACED = "replaced"
"""What the folder that is replaced is called meanwhile."""


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
        self._files_in = partial_path(path) / "files"
        self._files = AtomicFiles(
            {self._files_in / name: size for name, size in sizes.items()}, fresh=True
        )
        self._staging: Staging | None = None

    def __enter__(self) -> Self:
        refuse_folder(self._path, force=self._force)
        self._staging = claim(self._path)
        try:
            self._bring_back(self._staging.folder / _REPLACED)
            refuse_folder(self._path, force=self._force)
            self._staging.clear()
            self._files_in.mkdir()
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
        self._discard()

    def write(self, name: str, offset: int, data: ReadableBuffer) -> None:
        """Put ``data`` at ``offset`` of the file ``name``; from any thread."""
        self._files.write(self._files_in / name, offset, data)

    def flush(self) -> Stamps:
        """Flush every file to the disk; returns what the folder is known by: its manifest."""
        return {self._path.name: self._files.flush()[MANIFEST]}

    def publish(self) -> None:
        """Flush every file to the disk, then give the folder its name."""
        self._files.publish()
        refuse_folder(self._path, force=self._force)
        aside = partial_path(self._path) / _REPLACED
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

    def _discard(self) -> None:
        if self._staging is not None:
            self._staging.remove()
            self._staging = None
