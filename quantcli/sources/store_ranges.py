"""Ranges of an object in a store, as a model's files are read; and the small files beside them.

Size and tag of each object are those of the moment it was opened. A store tells no version with a
range, so both are asked for again when all has been read, before an output gets its name.
"""

from __future__ import annotations

import fnmatch
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.interrupts import before_leaving
from quantcli.sources.address import Address
from quantcli.sources.patience import PassingError, Patience
from quantcli.sources.remote_file import Place, RemoteFile
from quantcli.sources.store import explain_store, explaining_store, may_pass, open_store

_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "version_id", "mtime", "updated",
         "LastModified", "last_modified", "created")  # fmt: skip
"""What the packages call the marks of an object's version."""
MOST_SETTINGS = 256 << 20
"""Bytes of the largest file of settings or vocabulary."""


class StoreRanges:
    """The bytes of one object."""

    def __init__(self, filesystem: Any, path: str, address: Address, patience: Patience) -> None:
        self._filesystem, self._path = filesystem, path
        self._address, self._patience = address, patience
        self._mark = ""

    def begin(self, count: int) -> tuple[bytes, int, str]:
        """See `quantcli.sources.remote_file.Ranges`."""
        size, self._mark = self._persist(self._look)
        if size is None:
            raise SourceError(f"{self._address}: the store does not tell its size")
        first = bytearray(min(count, size))
        if first:
            self.fill(memoryview(first), 0)
        return bytes(first), size, self._mark

    def fill(self, view: memoryview, offset: int) -> None:
        """See `quantcli.sources.remote_file.Ranges`."""

        def read() -> bytes:
            stop = offset + len(view)
            found: bytes = self._filesystem.cat_file(self._path, start=offset, end=stop)
            if len(found) < len(view):
                raise PassingError(
                    f"{len(view)} bytes at {offset} were asked for, {len(found)} came"
                )
            if len(found) > len(view):
                raise SourceError(f"{self._address}: the store does not send it in parts")
            return found

        view[:] = self._persist(read)

    def check_unchanged(self) -> None:
        """SourceError where the object is not the one that was opened."""
        self._filesystem.invalidate_cache()
        if self._persist(self._look)[1] != self._mark:
            raise SourceError(
                f"{self._address}: has changed while it was read", hint="run it again"
            )

    def _look(self) -> tuple[int | None, str]:
        facts = self._filesystem.info(self._path)
        if facts.get("type") == "directory":
            raise FileNotFoundError(self._path)
        tags = " ".join(f"{name}={facts[name]}" for name in _TAGS if facts.get(name) is not None)
        return facts.get("size"), f"{facts.get('size')} {tags}"

    def _persist(self, work: Callable[[], Any]) -> Any:
        def attempt(came_forward: Callable[[], None]) -> Any:
            try:
                found = work()
            except (PassingError, SourceError):
                raise
            except Exception as error:
                if may_pass(error):
                    raise PassingError(str(error)) from error
                raise
            came_forward()
            return found

        try:
            return self._patience.persist(attempt)
        except PassingError as error:
            cause = error.__cause__
            raise explain_store(
                str(self._address), cause if isinstance(cause, Exception) else error
            ) from error
        except SourceError:
            raise
        except Exception as error:
            raise explain_store(str(self._address), error) from error


@dataclass(frozen=True)
class StoreModel:
    """A folder of a store with a model in it; ``url`` is its address without a slash behind."""

    url: str
    _opened: tuple[Any, str] = field(compare=False, repr=False)

    @property
    def root(self) -> Address:
        """The folder's address."""
        return Address(self.url)

    def open_file(self, path: Address, place: Place) -> RemoteFile:
        """See `quantcli.sources.remote_models.RemoteModel`."""
        filesystem, root = self._opened
        name = path.relative_to(self.root).as_posix()
        ranges = StoreRanges(filesystem, f"{root}/{name}", path, place.patience)
        return RemoteFile(path, ranges, place)

    def copy_files(
        self, patterns: Sequence[str], ignored: Sequence[str], *, most: int | None = None
    ) -> Path:
        """Files of the folder, in one of this machine that goes when the process ends.

        It has the folder's own name, after which outputs are called. SourceError where there is no
        such folder, and for a file of more than ``most`` bytes.
        """
        filesystem, root = self._opened
        with explaining_store(self.url):
            found = filesystem.find(root, maxdepth=2, detail=True)
            if not found:
                raise SourceError(f"{self.url}: there is no such folder, or nothing is in it")
            names = {path.removeprefix(root).lstrip("/"): path for path in found}
            target = self._make_folder()
            for name, path in names.items():
                if not any(fnmatch.fnmatch(name, each) for each in patterns):
                    continue
                if any(fnmatch.fnmatch(name, each) for each in ignored):
                    continue
                if most is not None and (found[path].get("size") or 0) > most:
                    raise SourceError(f"{self.url}/{name}: is too large for a settings file")
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(path, str(target / name))
        return target

    def _make_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="quantcli-"))
        before_leaving(partial(shutil.rmtree, folder, ignore_errors=True))
        target = folder / str(self.root.name)
        target.mkdir()
        return target


def open_store_model(url: str) -> StoreModel:
    """The folder at ``url``, not looked at yet; MissingExtraError names its protocol's package."""
    return StoreModel(url.rstrip("/"), open_store(url.rstrip("/")))
