"""Files of the Hub into its local cache, in a way that survives being stopped.

The cache is that of ``huggingface_hub``: contents under their entity tags in ``blobs``, links to
them under ``snapshots/COMMIT``, and in ``refs`` the commit of a branch. The library begins a file
anew after a kill; here what has come stays beside the blobs, under the file's tag, and the next run
asks for the rest. Each file is checked against the SHA-256 or Git's SHA-1 that the Hub lists for
its commit before it gets its name. Source: huggingface_hub's "Understand caching".
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.interrupts import left_behind, wait_for
from quantcli.sources.address import Address
from quantcli.sources.connections import Connections
from quantcli.sources.hub import (
    HubRequest,
    OnEvent,
    explain_gap,
    explaining,
    find_cached,
    find_facts,
)
from quantcli.sources.hub_ranges import HubRanges
from quantcli.sources.patience import Patience
from quantcli.systems import BINARY, CLOEXEC
from quantcli.types import Note, Progress

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FILES = 4
"""Files at a time."""
_PART = 1 << 20
_TOLD = 1 << 22
"""Bytes between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as the Hub lists it; ``tag`` is the SHA-256 of a large one, else Git's own SHA-1."""

    name: str
    size: int
    tag: str

    @property
    def is_large(self) -> bool:
        """Whether the tag is a SHA-256."""
        return len(self.tag) == 64


def fetch(wanted: HubRequest, on_event: OnEvent, *, ask: bool = False) -> Path:
    """The snapshot folder with the wanted files, downloaded if need be.

    ``ask`` compares with the Hub's list of files even when nothing seems to lack. SourceError when
    the repository, the revision or a file is not there or may not be read.
    """
    cached = None if ask else find_cached(wanted)
    if cached is not None:
        return cached
    on_event(Note(f"{wanted.label} is not in the local cache; asking the Hub"))
    folder = download(wanted, on_event)
    missing = wanted.lacks(folder)
    if missing is not None:
        raise explain_gap(wanted, missing)
    return folder


def download(wanted: HubRequest, on_event: OnEvent) -> Path:
    """The snapshot folder, with the wanted files downloaded into it.

    SourceError for what the Hub refuses, for a content that is not what it lists, and for a cache
    that cannot be written. What has come when a run is stopped stays for the next one.
    """
    facts = find_facts(wanted, files=True)
    files = [
        _listed(wanted, sibling)
        for sibling in facts.siblings or ()
        if _matches(wanted, sibling.rfilename)
    ]
    commit = _checked(wanted, facts.sha, "commit")
    home = _cache() / f"models--{wanted.repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    with explaining(wanted):
        for folder in (home / "blobs", snapshot, home / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        lacking = [each for each in files if not (snapshot / each.name).exists()]
        _fetch_all(wanted, commit, lacking, home, on_event)
        for each in lacking:
            _link(home / "blobs" / each.tag, snapshot / each.name)
        revision = wanted.revision or "main"
        reference = home / "refs" / revision
        if revision != commit and ".." not in reference.parts:
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)
    return snapshot


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _checked(wanted: HubRequest, tag: object, what: str) -> str:
    """A digest that names a file or a folder here; SourceError for anything else."""
    if not isinstance(tag, str) or _DIGEST.fullmatch(tag) is None:
        raise SourceError(f"{wanted.label}: the Hub's {what} {tag!r} is no digest")
    return tag


def _listed(wanted: HubRequest, sibling: Any) -> Listed:
    large = getattr(sibling, "lfs", None)
    tag = large["sha256"] if isinstance(large, dict) else getattr(large, "sha256", None)
    tag = _checked(wanted, tag or sibling.blob_id, f"tag of {sibling.rfilename}")
    return Listed(sibling.rfilename, int(sibling.size or 0), tag)


def _matches(wanted: HubRequest, name: str) -> bool:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    taken = any(fnmatch.fnmatch(name, pattern) for pattern in wanted.patterns)
    return taken and not any(fnmatch.fnmatch(name, pattern) for pattern in wanted.ignored)


def _fetch_all(
    wanted: HubRequest,
    commit: str,
    files: Sequence[Listed],
    home: Path,
    on_event: OnEvent,
) -> None:
    patience, connections = Patience(), Connections(_FILES, "download")
    told = _Told(wanted.label, sum(each.size for each in files), on_event)
    try:
        done: list[Future[None]] = []
        for each in {each.tag: each for each in files}.values():
            fetch = _Fetch(wanted, commit, each, home / "blobs", patience, told)
            done.append(connections.submit(fetch.run))
        for future in done:
            wait_for(future)
    finally:
        patience.stop.set()
        connections.close()
        if connections.busy:
            left_behind.set()


class _Told:
    """Bytes of all files so far, told now and then, each number once."""

    def __init__(self, label: str, total: int, on_event: OnEvent) -> None:
        self._label, self._total, self._on_event = label, total, on_event
        self._done = self._last = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._done - self._last < _TOLD and self._done < self._total:
                return
            if self._done > self._last:
                self._last = self._done
                self._on_event(Progress(self._done, self._total, self._label))


@dataclass(frozen=True, slots=True)
class _Fetch:
    """One file's way into the blobs."""

    wanted: HubRequest
    commit: str
    file: Listed
    blobs: Path
    patience: Patience
    told: _Told

    def run(self) -> None:
        """Fetch what is not there yet, check the whole and give it its name."""
        blob = self.blobs / self.file.tag
        if blob.exists():
            self.told.add(self.file.size)
            return
        with _owned(self.blobs, self.file.tag) as partial_file:
            there = min(partial_file.stat().st_size, self.file.size)
            self.told.add(there)
            digest = self._begin_digest()
            with partial_file.open("r+b") as target:
                _read_into(digest, target, there)
                target.truncate(there)
                self._receive(target, there, digest)
            if digest.hexdigest() != self.file.tag:
                partial_file.unlink()
                raise SourceError(
                    f"{self.wanted.label}: {self.file.name} is not what the Hub lists: its digest "
                    "is another",
                    hint="run it again",
                )
            partial_file.replace(blob)

    def _begin_digest(self) -> Any:
        if self.file.is_large:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.file.size}\0".encode(), usedforsecurity=False)

    def _receive(self, target: Any, there: int, digest: Any) -> None:
        wanted = HubRequest(self.wanted.repo, self.commit, (), (), lambda _: None)
        path = Address(f"hf://{self.wanted.repo}@{self.commit}") / self.file.name
        ranges = HubRanges(wanted, self.file.name, path, self.patience)

        def take(part: bytes) -> None:
            target.write(part)
            digest.update(part)
            self.told.add(len(part))

        ranges.receive(there, self.file.size, take)


def _read_into(digest: Any, file: Any, count: int) -> None:
    left = count
    while left:
        part = file.read(min(_PART, left))
        digest.update(part)
        left -= len(part)


@contextmanager
def _owned(blobs: Path, tag: str) -> Iterator[Path]:
    """The file that holds what has come of ``tag``, locked, or a new one while another run has it.

    What an error of the Hub's leaves stays.
    """
    path = blobs / f"{tag}.quantcli"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | BINARY | CLOEXEC, 0o666)
    try:
        if not _lock(descriptor):
            path = blobs / f"{tag}.{os.getpid()}.quantcli"
            path.touch()
        yield path
    finally:
        os.close(descriptor)
        if path.name.count(".") > 1:
            path.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Whether the file is ours now; where there are no locks, it is taken to be."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _link(blob: Path, name: Path) -> None:
    """The file under its name: a relative link, or a copy where links are not to be had."""
    if name.exists():
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        name.symlink_to(os.path.relpath(blob, name.parent))
    except FileExistsError:
        return
    except OSError:
        blob.replace(name)
