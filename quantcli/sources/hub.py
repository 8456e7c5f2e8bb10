"""Files of a Hugging Face Hub repository: the local cache first, then a download.

``huggingface_hub`` does the work and honours its own environment (HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT); it is imported only when a repository is asked for. A cached snapshot
is taken without asking the Hub when all that is needed is in it. What goes wrong on the way is one
sentence each, and the library's own bars stay dark: progress comes as events.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.interrupts import wait_unless_interrupted
from quantcli.types import Event, Note, Progress

OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class HubRequest:
    """Which files of which repository, and how to see that a snapshot holds them all."""

    repo: str
    revision: str | None
    patterns: tuple[str, ...]
    ignored: tuple[str, ...]
    lacks: Callable[[Path], str | None]
    """Says what a snapshot folder lacks, None when it is whole."""

    @property
    def label(self) -> str:
        """The repository as a user types it."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def fetch(wanted: HubRequest, on_event: OnEvent, *, ask: bool = False) -> Path:
    """The snapshot folder with the wanted files, downloaded if need be.

    ``ask`` compares with the Hub's list of files even when nothing seems to lack. SourceError when
    the repository, the revision or a file is not there or may not be read.
    """
    cached = None if ask else find_cached(wanted)
    if cached is not None:
        return cached
    on_event(Note(f"{wanted.label} is not in the local cache; asking the Hub"))
    with explaining(wanted), dark():
        stop = threading.Event()
        bar = _bar_class(wanted.label, on_event, stop)
        folder = wait_unless_interrupted(partial(_snapshot, wanted, tqdm_class=bar), stop)
    missing = wanted.lacks(folder)
    if missing is not None:
        raise explain_gap(wanted, missing)
    return folder


def find_cached(wanted: HubRequest) -> Path | None:
    """The snapshot folder in the local cache, None when it is not there or lacks something."""
    with explaining(wanted):
        return _cached(wanted)


@contextmanager
def explaining(wanted: HubRequest) -> Iterator[None]:
    """Turns whatever ``huggingface_hub`` raises inside into a SourceError."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise SourceError(f"{wanted.label}: is not a repository's name: {error}") from error
    except network_errors() as error:
        raise _explain(error, wanted) from error


def _snapshot(wanted: HubRequest, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            allow_patterns=list(wanted.patterns),
            ignore_patterns=list(wanted.ignored) or None,
            **options,
        )
    )


def _cached(wanted: HubRequest) -> Path | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _snapshot(wanted, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return folder if wanted.lacks(folder) is None else None


def network_errors() -> tuple[type[Exception], ...]:
    """What a failed request raises: by the library's version, its base is requests' or httpx's."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _explain(error: Exception, wanted: HubRequest) -> SourceError:
    """The sentence for what ``huggingface_hub`` raised; the more special errors come first."""
    from huggingface_hub import errors

    label, page = wanted.label, f"https://huggingface.co/{wanted.repo}"
    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            f"{label}: the repository is gated, and this account has not been let in",
            hint=f"accept its terms at {page}, then: hf auth login (or set HF_TOKEN)",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"{label}: the Hub has no such repository, or it is private",
            hint="check the spelling; for a private one: hf auth login (or set HF_TOKEN)",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"{label}: the repository has no revision {wanted.revision!r}")
    if isinstance(error, errors.HfHubHTTPError):
        return SourceError(f"{label}: the Hub answered: {first_line(error)}")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return SourceError(f"{label}: cannot be stored in the local cache: {error}")
    if _offline():
        return SourceError(
            f"{label}: is not (completely) in the local cache, and HF_HUB_OFFLINE forbids asking "
            "the Hub",
            hint="unset HF_HUB_OFFLINE, or name a local folder",
        )
    return SourceError(
        f"{label}: is not (completely) in the local cache, and the Hub cannot be reached: "
        f"{first_line(error.__cause__ or error)}"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's words that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def explain_gap(wanted: HubRequest, missing: str) -> SourceError:
    """Why a snapshot is not whole: the Hub was out of reach, or the repository is another kind."""
    from huggingface_hub import HfApi

    try:
        facts = HfApi().model_info(wanted.repo, revision=wanted.revision)
    except network_errors() as error:
        return _explain(error, wanted)
    names = sorted(sibling.rfilename for sibling in facts.siblings or ())
    models = [name for name in names if name.endswith(".gguf")]
    hint: str | None = None
    if models:
        hint = f"it holds GGUF files; name one: hf://{wanted.repo}/{models[0]}"
    elif any(name.endswith(".bin") for name in names):
        hint = (
            "it holds PyTorch weights; convert them at "
            "https://huggingface.co/spaces/safetensors/convert"
        )
    return SourceError(f"{wanted.label}: {missing}", hint=hint)


@contextmanager
def dark() -> Iterator[None]:
    """Keep the library's own bars and warnings off the terminal."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    was_dark = are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not was_dark:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not was_dark:
            enable_progress_bars()


def _bar_class(label: str, on_event: OnEvent, stop: threading.Event) -> type[Any]:
    """A tqdm that draws nothing and tells ``on_event`` the bytes so far.

    When ``stop`` is set it raises KeyboardInterrupt, which ends the thread that downloads.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    told = 0

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **options | {"file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> None:
            """Draw nothing."""

        def update(self, n: float | None = 1) -> None:
            nonlocal told
            if stop.is_set():
                raise KeyboardInterrupt
            super().update(n)
            # Several bars count the same bytes (received, written); follow the foremost.
            if self.unit == "B" and self.n > told:
                told = int(self.n)
                on_event(Progress(told, max(told, int(self.total or 0)), label))

    return Bar
