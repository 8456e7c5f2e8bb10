"""Outputs that belong into an object store: made on this machine, then uploaded whole.

An object appears when its upload is complete, so nobody finds half a file; of several files those
by which the others are found (config.json, the manifest, a split GGUF's first file) come last. The
size of each is compared with what the store holds then, and its digest where the store tells one.
What a failed upload leaves is kept on this machine, since it may have taken hours.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from quantcli.artifacts.atomic_folder import MANIFEST
from quantcli.artifacts.scratch_place import check_scratch
from quantcli.errors import OutputError, UsageError
from quantcli.events import Events, in_phase, take
from quantcli.report.tables import Table
from quantcli.sources.address import Address
from quantcli.sources.store import PACKAGES, explaining_store, is_store, open_store
from quantcli.types import Event, Note, Progress

_PART = 8 << 20
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_LATE = re.compile(rf"(.*/)?(config\.json|{re.escape(MANIFEST)})|.*-00001-of-\d{{5}}\.gguf")
"""Names without which the other files are nothing."""


@dataclass(frozen=True, slots=True)
class Uploaded(Event):
    """All files are in the store, under these addresses."""

    urls: tuple[str, ...]


class StoreOutput:
    """The place ``url`` in a store, and the folder of this machine where its files are made first.

    ``place`` is what to give as the output's path. A context manager, which removes the folder
    unless an upload has failed.
    """

    def __init__(
        self, url: str, *, force: bool, dry_run: bool, scratch: str | Path | None = None
    ) -> None:
        self._url, self._force = url.rstrip("/"), force
        self._filesystem, self._path = open_store(self._url, output=True)
        self._keep = False
        base, _, name = self._url.rpartition("/")
        if base.endswith(":/") or not name:
            raise UsageError(f"{url} names a bucket alone", hint=f"name a file: {self._url}/m.gguf")
        if scratch is not None:
            check_scratch(Path(scratch))
        self._base = base
        self._folder = Path(tempfile.mkdtemp(prefix="quantcli-", dir=scratch))
        self.place = str(self._folder / name) + ("/" if url.endswith("/") else "")
        try:
            if not dry_run:
                self._check(is_folder=url.endswith("/"))
        except BaseException:
            shutil.rmtree(self._folder)
            raise

    def __enter__(self) -> StoreOutput:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._keep:
            shutil.rmtree(self._folder, ignore_errors=True)

    def label(self, found: Any) -> Any:
        """A document, a table or a path with the store's addresses in place of this machine's."""
        if isinstance(found, Table):
            return replace(found, rows=tuple(map(self._label_row, found.rows)))
        if isinstance(found, dict):
            return {key: self.label(value) for key, value in found.items()}
        if isinstance(found, list | tuple):
            return [self.label(value) for value in found]
        if isinstance(found, Path):
            return Address(self.label(str(found)))
        if isinstance(found, str):
            return found.replace(str(self._folder), self._base)
        return found

    def _label_row(self, row: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(self.label, row))

    def url_of(self, path: Path) -> str:
        """The address that a file made here will have."""
        return f"{self._base}/{path.relative_to(self._folder).as_posix()}"

    def publish(self) -> Events[tuple[str, ...]]:
        """Upload all that was made, as a phase of a run; returns the addresses."""
        done = yield from in_phase("uploading", take(self._upload(), Uploaded))
        return done.urls

    def _upload(self) -> Iterator[Event]:
        made = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]
        shown = [path for path in made if not any(part[0] == "." for part in self._parts(path))]
        files = sorted(
            shown, key=lambda path: _LATE.fullmatch("/".join(self._parts(path))) is not None
        )
        files.sort(key=lambda path: path.name == MANIFEST)
        total, done = sum(path.stat().st_size for path in files), 0
        sent: list[str] = []
        self._keep = True
        try:
            for path in files:
                self._refuse_existing(self.url_of(path), self._target(path))
            for path in files:
                yield Progress(done, total, path.name)
                self._put(path)
                sent.append(self._target(path))
                done += path.stat().st_size
            yield Progress(total, total, "")
        except (OutputError, KeyboardInterrupt):
            if not self._force:
                # None of them was there before, and half of them is of no use.
                for target in sent:
                    self._remove(target)
            yield Note(f"what was made is kept: {self._folder}", "warning")
            raise
        self._keep = False
        yield Uploaded(tuple(self.url_of(path) for path in files))

    def _parts(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self._folder).parts

    def _target(self, path: Path) -> str:
        base = self._path.rpartition("/")[0]
        return f"{base}/{path.relative_to(self._folder).as_posix()}"

    def _put(self, path: Path) -> None:
        """Upload one file, under its name only when it is whole; OutputError."""
        url, target = self.url_of(path), self._target(path)
        scheme = url.partition("://")[0]
        # A store shows an object when its upload is complete; other filesystems as it grows.
        place = target if scheme in PACKAGES else f"{target}.{uuid4().hex[:8]}.partial"
        with explaining_store(url, output=True):
            if scheme not in PACKAGES:
                self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            try:
                self._filesystem.put_file(str(path), place)
                self._filesystem.invalidate_cache()
                self._check_copy(path, url, place)
                if place != target:
                    self._filesystem.mv(place, target)
            except BaseException:
                self._remove(place)
                raise

    def _check_copy(self, path: Path, url: str, place: str) -> None:
        facts = self._filesystem.info(place)
        size = path.stat().st_size
        if facts.get("size") != size:
            raise OutputError(f"{url}: {size:,} bytes were sent, the store holds {facts['size']:,}")
        told = _MD5.fullmatch(str(facts.get("ETag") or facts.get("etag") or ""))
        if told is not None and not facts.get("SSEKMSKeyId") and told[1] != _md5(path):
            # An object that was sent in one part has its MD5 as its tag, unless it is encrypted.
            raise OutputError(f"{url}: the store's digest is not that of what was sent")

    def _remove(self, place: str) -> None:
        with suppress(Exception):
            self._filesystem.rm_file(place)

    def _check(self, *, is_folder: bool) -> None:
        """Before hours of work: OutputError where something is there, or nothing may be written."""
        if not is_folder:
            self._refuse_existing(self._url, self._path)
        probe = f"{self._path}.{uuid4().hex[:8]}.probe"
        with explaining_store(self._url, output=True):
            self._filesystem.pipe_file(probe, b"quantcli looks whether it may write here")
            self._filesystem.rm_file(probe)

    def _refuse_existing(self, url: str, target: str) -> None:
        if self._force:
            return
        with explaining_store(url, output=True):
            self._filesystem.invalidate_cache()
            there = bool(self._filesystem.exists(target))
        if there:
            raise OutputError(f"{url} exists already", hint="--force replaces it")


def _md5(path: Path) -> str:
    whole = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while part := file.read(_PART):
            whole.update(part)
    return whole.hexdigest()


def stage_output(
    output: str | Path | None,
    *,
    force: bool = False,
    dry_run: bool = False,
    scratch: str | Path | None = None,
    **given: object,
) -> StoreOutput | None:
    """The place in a store that ``output`` names; None where it is on this machine.

    Files are made in ``scratch`` first, or where the system keeps temporary ones. UsageError for an
    option in ``given`` that needs the output here, OutputError where the store
    refuses.
    """
    if output is None or not is_store(str(output)):
        return None
    for name, value in given.items():
        if value:
            raise UsageError(
                f"--{name} needs an output on this machine, and {output} is in a store",
                hint="name one on this machine with -o, and upload it afterwards",
            )
    return StoreOutput(str(output), force=force, dry_run=dry_run, scratch=scratch)
