"""Where ranks meet: a folder beside the output that all of them see.

Each writes ``rank-N.json``, who it is and what it makes, and looks at the others': one that makes
something else is refused. Ranks that run together wait for each other's, which tells that the
folder is shared, touch ``beat-N`` while they live and leave ``failed-N`` when they end otherwise.
``done-N`` says that a rank has written its slabs, ``checked-N`` that another has found them right,
and whoever makes ``publisher`` gives the output its name. A file appears whole, by a rename, and is
known by its content; clocks of different machines are never compared.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from quantcli.errors import OutputError, UsageError
from quantcli.ranks.share import Share, name_of
from quantcli.ranks.slab_sums import SlabLog
from quantcli.systems import CLOEXEC

COUNT = "how many there are"
"""The fact that says it."""

TIMEOUT = "QUANTCLI_RANK_TIMEOUT"
"""Seconds after which a rank that shows no sign of life is given up, as a variable."""
_SECONDS = 120.0
_LOOK = 0.2
"""Seconds between two looks at what the others left."""
_CHECK = 2.0
"""Seconds between two looks for failures while a rank works."""


class RankEndedError(OutputError):
    """Another rank has failed, and this one ends with it."""


def read_timeout(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds to wait for a sign of life; UsageError for what is no number above 0."""
    text = environment.get(TIMEOUT, "").strip()
    if not text:
        return _SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{TIMEOUT}={text} is not a number of seconds", hint="120 is usual")
    return seconds


class Meeting:
    """This rank's part in the meeting in ``folder``; a context manager, entered where it begins.

    ``facts`` are what all ranks must have in common, by what they are called in a message.
    """

    def __init__(
        self, folder: Path, share: Share, facts: Mapping[str, str], timeout: float
    ) -> None:
        self.folder = folder
        self.share = share
        self.timeout = timeout
        self._facts = dict(facts)
        self._token = secrets.token_hex(8)
        self._known: dict[str, str] = {}
        self._begun = False
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None
        self._looked = 0.0

    # -- coming and going ---------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self.share.merges:
            self._agree()
            return self
        self.folder.mkdir(exist_ok=True)
        try:
            self._agree()
        except UsageError as error:
            self.__exit__(type(error), error, None)
            raise
        self._unlink(f"failed-{self.share.index}")
        # Those of an earlier attempt do not count.
        self._known = {name: self._read(name) for name in self._names("failed-")}
        who = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}
        self._write(f"rank-{self.share.index}.json", json.dumps(who | {"facts": self._facts}))
        self._begun = True
        try:
            self._agree()
            if self.share.together:
                self._tell(f"beat-{self.share.index}", 0, os.O_CREAT)
                self._beats = self._start_beats(f"beat-{self.share.index}")
                self._wait_for_all()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
            self._unlink(f"beat-{self.share.index}")
        if error is None or self.share.merges:
            return
        if self.share.together and not isinstance(error, RankEndedError):
            with suppress(OSError):
                self._write(f"failed-{self.share.index}", f"{self._token} {error}")
        if self._begun and not self._names(f"slabs-{self.share.index}-"):
            # It has written nothing that another attempt would have to fit.
            self._unlink(f"rank-{self.share.index}.json")

    @property
    def is_empty(self) -> bool:
        """Whether no rank has left anything that counts."""
        return not self._names("rank-")

    def _agree(self) -> None:
        """UsageError where a rank makes something else than this one."""
        name, others = self.share.label, self._records()
        for index, found in sorted(others.items()):
            facts = found.get("facts", {})
            for what, mine in self._facts.items():
                if facts.get(what) == mine or (self._begun and index == self.share.index):
                    continue
                if self._begun:
                    self._unlink(f"rank-{self.share.index}.json")
                theirs = name_of(index, int(facts.get(COUNT, 0)), together=self.share.together)
                raise UsageError(
                    f"{name} and {theirs}, which ran on {found.get('host')}, differ in {what}",
                    hint="give all of them the same command and the same version; to begin anew, "
                    f"remove {self.folder.parent}",
                )

    def _wait_for_all(self) -> None:
        def missing() -> list[int]:
            return [i for i in range(self.share.count) if not self._has(f"rank-{i}.json")]

        began = time.monotonic()
        while absent := missing():
            self.check(now=True)
            if time.monotonic() - began > self.timeout:
                raise OutputError(
                    f"{self.share.label} has waited {self.timeout:g} s for "
                    f"{_list(f'rank {i}' for i in absent)} of {self.share.count} in {self.folder}",
                    hint="start all of them, with -o in a folder that their machines share; "
                    f"{TIMEOUT} sets the seconds",
                )
            time.sleep(_LOOK)
        self._agree()

    # -- while it works ------------------------------------------------------------------------

    def check(self, *, now: bool = False) -> None:
        """RankEndedError where another rank that runs together with this one has failed."""
        clock = time.monotonic()
        if not self.share.together or (clock - self._looked < _CHECK and not now):
            return
        self._looked = clock
        for name in self._names("failed-"):
            if self._read(name) != self._known.get(name):
                number = name.removeprefix("failed-")
                raise RankEndedError(
                    f"{self.share.label} ends, since rank {number} has failed",
                    hint=f"what rank {number} says tells why",
                )

    def open_log(self) -> SlabLog:
        """The log of this attempt."""
        return SlabLog(self.folder / f"slabs-{self.share.index}-{self._token}")

    def logs(self) -> list[Path]:
        """Those of all ranks and attempts."""
        return [self.folder / name for name in self._names("slabs-")]

    def mark(self, kind: str, index: int) -> None:
        """Say that rank ``index`` is "done" or "checked"."""
        self._write(f"{kind}-{index}", self._token)

    def unmark(self, kind: str, index: int) -> None:
        """Take a mark back."""
        self._unlink(f"{kind}-{index}")

    def marked(self, kind: str, count: int) -> list[bool]:
        """Of which of ``count`` ranks that has been said."""
        return [self._has(f"{kind}-{index}") for index in range(count)]

    def wait_for(self, kind: str, index: int, by: int) -> bool:
        """Wait until rank ``index`` has the mark that rank ``by`` gives it.

        False where ``by`` shows no sign of life.
        """
        life = _Life(lambda: self._read(f"beat-{by}"), self.timeout)
        while not self._has(f"{kind}-{index}"):
            self.check()
            if life.is_over() or self.is_gone():
                return self._has(f"{kind}-{index}")
            time.sleep(_LOOK)
        return True

    # -- the end -------------------------------------------------------------------------------

    def claim(self) -> bool:
        """Whether this rank is to publish; waits for another that does and is alive.

        Returns False when the folder is gone: the output has been published.
        """
        path = self.folder / "publisher"
        while not self.is_gone():
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | CLOEXEC
                os.close(os.open(path, flags, 0o600))
            except FileExistsError:
                self._outwait(path)
                continue
            except FileNotFoundError:
                return False
            self._tell("publisher", 0)
            self._start_beats("publisher")
            return True
        return False

    def close_down(self) -> None:
        """The output has its name: nobody meets here again, and the folder can be removed."""
        self._stop.set()
        with suppress(OSError):
            self.folder.rename(self.folder.with_name(f"{self.folder.name}-{self._token}"))

    def resign(self) -> None:
        """This rank does not publish after all; another may."""
        self._stop.set()
        self._unlink("publisher")

    def is_gone(self) -> bool:
        """Whether the meeting has been removed."""
        return not self.folder.is_dir()

    def _outwait(self, path: Path) -> None:
        """Wait until the publisher has ended, and take its place where it shows no sign of life."""
        life = _Life(lambda: self._read(path.name), self.timeout)
        while path.exists():
            self.check()
            if life.is_over():
                with suppress(OSError):
                    path.rename(path.with_name(f"publisher-{self._token}"))
                return
            time.sleep(_LOOK)

    # -- signs of life -------------------------------------------------------------------------

    def _start_beats(self, name: str) -> threading.Thread:
        thread = threading.Thread(target=self._live, args=(name,), name="beat", daemon=True)
        thread.start()
        return thread

    def _live(self, name: str) -> None:
        number = 0
        while not self._stop.wait(min(2.0, self.timeout / 5)):
            number += 1
            self._tell(name, number)

    def _tell(self, name: str, number: int, create: int = 0) -> None:
        """Change a file that says that this rank lives; one that was removed stays so."""
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_TRUNC | CLOEXEC | create
            descriptor = os.open(self.folder / name, flags, 0o600)
            try:
                os.write(descriptor, f"{self._token} {number}".encode())
            finally:
                os.close(descriptor)

    # -- files ---------------------------------------------------------------------------------

    def count(self) -> int:
        """How many ranks there are: for a merge, what they say themselves."""
        counts = [int(found["facts"][COUNT]) for found in self._records().values()]
        if not counts:
            raise UsageError(
                f"no shard has begun in {self.folder.parent}", hint="--shard 1/2 is one of two"
            )
        return counts[0]

    def _records(self) -> dict[int, dict[str, Any]]:
        found = {}
        for name in self._names("rank-"):
            with suppress(ValueError):
                number = int(name.removeprefix("rank-").removesuffix(".json"))
                record = json.loads(self._read(name) or "null")
                if isinstance(record, dict):
                    found[number] = record
        return found

    def _names(self, prefix: str) -> list[str]:
        try:
            found = (path.name for path in self.folder.iterdir())
            return sorted(name for name in found if name.startswith(prefix))
        except FileNotFoundError:
            return []

    def _has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _read(self, name: str) -> str:
        """The content; nothing where there is none."""
        try:
            return (self.folder / name).read_text(errors="replace")
        except OSError:
            return ""

    def _write(self, name: str, content: str) -> None:
        part = self.folder / f".{name}-{self._token}"
        part.write_text(content)
        part.replace(self.folder / name)

    def _unlink(self, name: str) -> None:
        with suppress(OSError):
            (self.folder / name).unlink()


class _Life:
    """Watches what another process changes while it lives."""

    def __init__(self, look: Callable[[], str], timeout: float) -> None:
        self._look = look
        self._timeout = timeout
        self._last = look()
        self._since = time.monotonic()

    def is_over(self) -> bool:
        """Whether it is gone, or has not changed for the time given."""
        now = self._look()
        if now != self._last:
            self._last, self._since = now, time.monotonic()
        # An empty file may be one that is being written.
        limit = self._timeout if now else min(self._timeout, 5.0)
        return time.monotonic() - self._since > limit


def _list(names: Iterable[str]) -> str:
    found = list(names)
    shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
    return shown if len(found) != 2 else " and ".join(found)
