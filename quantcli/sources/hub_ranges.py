"""Ranges of a file in a repository of the Hugging Face Hub, over ``huggingface_hub``'s session.

The Hub answers with a redirect to where large files are stored, which is good for a while: it is
asked once, and again when the signed address has expired, so that a model of a hundred thousand
ranges does not use up what the Hub allows a client to ask. The token goes to the Hub alone. Size
and entity tag of every answer must be those of the first one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from quantcli.errors import SourceError
from quantcli.sources.address import Address
from quantcli.sources.hub import (
    HubRequest,
    explain_gap,
    explaining,
    first_line,
    has_met,
    may_pass,
    network_errors,
    told_wait,
)
from quantcli.sources.patience import PassingError, Patience

T = TypeVar("T")

_EXPIRED = frozenset({400, 401, 403, 404, 410})
"""What a signed address answers when its time is over."""
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class HubRanges:
    """The bytes of the file ``name``; ``wanted`` names the repository and the commit."""

    def __init__(self, wanted: HubRequest, name: str, path: Address, patience: Patience) -> None:
        from huggingface_hub import hf_hub_url

        self._wanted, self._name, self._path, self._patience = wanted, name, path, patience
        self._url = hf_hub_url(wanted.repo, name, revision=wanted.revision)
        self._moved: str | None = None
        self._size: int | None = None
        self._tag: str | None = None
        self._lock = threading.Lock()

    def begin(self, count: int) -> tuple[bytes, int, str]:
        """See `quantcli.sources.remote_file.Ranges`."""
        data = bytearray(count)
        got = self._fetch(memoryview(data), 0)
        return bytes(data[:got]), self._size or 0, self._tag or ""

    def fill(self, view: memoryview, offset: int) -> None:
        """See `quantcli.sources.remote_file.Ranges`."""
        got = self._fetch(view, offset)
        if got != len(view):
            raise SourceError(
                f"{self._path}: {len(view)} bytes at {offset} were asked for, {got} came"
            )

    def check_unchanged(self) -> None:
        """A commit does not change; each answer's size and tag were looked at as it came."""

    def receive(self, start: int, stop: int, take: Callable[[bytes], None]) -> None:
        """Give the bytes from ``start`` to the file's end at ``stop`` to ``take``, as they come."""
        place = start

        def attempt(came_forward: Callable[[], None]) -> None:
            nonlocal place
            while place < stop:
                for part in self._parts(place, stop - place, whole=True):
                    take(part)
                    place += len(part)
                    came_forward()

        self._persist(attempt)

    def _fetch(self, view: memoryview, offset: int) -> int:
        """Fill the view as far as the file goes; bytes that have come are not asked for again."""
        done = 0

        def attempt(came_forward: Callable[[], None]) -> int:
            nonlocal done
            for part in self._parts(offset + done, len(view) - done):
                view[done : done + len(part)] = part
                done += len(part)
                came_forward()
            return done

        return self._persist(attempt)

    def _persist(self, attempt: Callable[[Callable[[], None]], T]) -> T:
        with explaining(self._wanted):
            try:
                return self._patience.persist(attempt)
            except PassingError as error:
                if error.__cause__ is not None:
                    raise error.__cause__ from error
                raise SourceError(f"{self._path}: {error}") from error

    def _parts(self, offset: int, count: int, *, whole: bool = False) -> Iterator[bytes]:
        """At most ``count`` bytes at ``offset``; PassingError for what may pass.

        ``whole``: a server that sends nothing but the whole file will do.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
        )

        moved = self._moved
        headers = {} if moved else build_hf_headers()
        headers["Accept-Encoding"] = "identity"
        if offset or not whole:
            headers["Range"] = f"bytes={offset}-{offset + count - 1}"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with _stream(get_session(), moved or self._url, headers, timeout) as answer:
                self._note_move(answer)
                self._check_status(answer, moved)
                if whole and answer.status_code == 200:
                    passed_over, expected = offset, count
                else:
                    passed_over, expected = 0, self._check_range(answer, offset, count)
                got = 0
                for piece in _body(answer):
                    part = piece[passed_over:][: expected - got]
                    passed_over -= min(passed_over, len(piece))
                    got += len(part)
                    if part:
                        yield part
                if got < expected:
                    raise PassingError(f"the answer ended {expected - got} bytes early")
        except network_errors() as error:
            if not may_pass(error):
                raise
            raise PassingError(first_line(error), answered=has_met(error)) from error

    def _check_status(self, answer: Any, moved: str | None) -> None:
        """Raise what a refusal means: PassingError where it may pass, else the library's own."""
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status = answer.status_code
        if status < 400:
            return
        if moved is not None and status in _EXPIRED:
            with self._lock:
                self._moved = None
            raise PassingError("the address of the file has expired", wait=0.0)
        # The library's error quotes the body, which is not read yet.
        answer.read() if hasattr(answer, "read") else answer.content
        try:
            hf_raise_for_status(answer)
        except EntryNotFoundError as error:
            if self._size is not None:
                raise SourceError(
                    f"{self._path}: is no longer there; the repository's history was rewritten "
                    "while it was read",
                    hint="run it again",
                ) from error
            missing = f"the repository holds no {self._name}"
            raise explain_gap(self._wanted, missing) from error
        except HfHubHTTPError as error:
            if not may_pass(error):
                raise
            raise PassingError(first_line(error), wait=told_wait(answer)) from error

    def _check_range(self, answer: Any, offset: int, count: int) -> int:
        """How many bytes follow; SourceError unless they are those of the version that is read."""
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status_code != 206 or match is None:
            raise SourceError(
                f"{self._wanted.label}: the server does not send {self._name} in parts",
                hint="--download fetches the model first",
            )
        start, last, size = map(int, match.groups())
        if start != offset or last >= offset + count:
            raise PassingError(f"bytes {start} to {last} came, {count} at {offset} were asked for")
        tag = (answer.headers.get("ETag") or "").removeprefix("W/").strip('"')
        with self._lock:
            if self._size is None:
                self._size = size
            # The Hub and the store behind it may each have a tag of their own; their sizes agree.
            tag = f"{urlsplit(str(answer.url)).netloc} {tag}" if tag else ""
            changed = self._tag is not None and tag != self._tag and _host(tag) == _host(self._tag)
            self._tag = tag if self._tag is None else self._tag
        if size != self._size or changed:
            raise SourceError(
                f"{self._path}: has changed while it was read",
                hint="run it again; a commit after the @ pins a version",
            )
        return last + 1 - start

    def _note_move(self, answer: Any) -> None:
        """Go to the file's store at once from now on, where the Hub has sent us there."""
        if answer.history:
            with self._lock:
                self._moved = str(answer.url)


def _host(tag: str) -> str:
    return tag.partition(" ")[0]


def _stream(session: Any, url: str, headers: dict[str, str], timeout: float) -> Any:
    """The answer as a context manager, its body not read yet; sessions are httpx' or requests'."""
    if callable(getattr(session, "stream", None)):
        return session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
    return session.get(url, headers=headers, timeout=timeout, stream=True)


def _body(answer: Any) -> Iterator[bytes]:
    """The body in pieces as they come."""
    found: Iterator[bytes]
    found = answer.iter_raw() if hasattr(answer, "iter_raw") else answer.iter_content(1 << 18)
    return found
