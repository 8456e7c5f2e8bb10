"""What a Hugging Face Hub repository holds, and what of it is in the local cache.

``huggingface_hub`` does the work and honours its own environment (HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT); it is imported only when a repository is asked for. A cached snapshot
is taken without asking the Hub when all that is needed is in it. What goes wrong on the way is one
sentence each, and the library's own bars stay dark: progress comes as events.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from quantcli.errors import SourceError
from quantcli.interrupts import wait_unless_interrupted
from quantcli.sources.patience import STATUSES, PassingError, Patience, read_retry_after
from quantcli.types import Event

T = TypeVar("T")

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{6,}")
_QUERY = re.compile(r"(?<=[\w/])\?[\w.%-]+=[^\s'\"]*")
"""The end of an address, where signatures are."""
_RATE_LIMIT = re.compile(r"\bt=(\d+)")
"""Seconds until the Hub takes requests again."""

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


def find_commit(wanted: HubRequest, name: str) -> str:
    """The commit that the revision stands for now; SourceError unless it holds ``name``."""
    facts = find_facts(wanted)
    if not any(sibling.rfilename == name for sibling in facts.siblings or ()):
        raise explain_gap(wanted, f"the repository holds no file {name}")
    return str(facts.sha)


def find_facts(wanted: HubRequest, *, files: bool = False) -> Any:
    """The library's ``ModelInfo``: commit and files, with ``files`` their sizes and tags too."""
    stop = threading.Event()
    with explaining(wanted), dark():
        return wait_unless_interrupted(
            partial(_persist, stop, partial(_facts, wanted, files_metadata=files)), stop
        )


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


def _persist(stop: threading.Event, work: Callable[[], T]) -> T:
    """What ``work`` returns, done again after what may pass by itself."""

    def attempt(_: Callable[[], None]) -> T:
        try:
            return work()
        except network_errors() as error:
            if not may_pass(error):
                raise
            response = getattr(_root(error), "response", None)
            wait = None if response is None else told_wait(response)
            raise PassingError(first_line(error), wait=wait, answered=has_met(error)) from error

    try:
        return Patience(stop).persist(attempt)
    except PassingError as error:
        raise error.__cause__ or error from None


def _root(error: BaseException) -> BaseException:
    """What the error was raised from first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def may_pass(error: Exception) -> bool:
    """Whether what ``huggingface_hub`` raised may be over when it is tried again."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    root = _root(error)
    if isinstance(root, HfHubHTTPError):
        return root.response is not None and root.response.status_code in STATUSES
    if isinstance(root, OfflineModeIsEnabled | LocalEntryNotFoundError) or _offline():
        return False
    # An error of the local disk has a number; of those of the network not all have.
    return not isinstance(root, OSError) or isinstance(root, ConnectionError) or not root.errno


_NOT_MET = ("ConnectError", "ConnectTimeout", "ConnectionRefusedError", "gaierror")


def has_met(error: BaseException) -> bool:
    """Whether there was somebody to talk to, whatever came of it."""
    kinds = {type(error).__name__}
    while error.__cause__ is not None:
        error = error.__cause__
        kinds.add(type(error).__name__)
    return kinds.isdisjoint(_NOT_MET)


def told_wait(answer: Any) -> float | None:
    """Seconds that an answer asks us to wait: Retry-After, or the Hub's own RateLimit."""
    told = read_retry_after(answer.headers.get("Retry-After"))
    if told is None and answer.status_code == 429:
        match = _RATE_LIMIT.search(answer.headers.get("RateLimit", ""))
        told = None if match is None else float(match[1])
    return told


def _facts(wanted: HubRequest, **options: Any) -> Any:
    from huggingface_hub import HfApi

    return HfApi().model_info(wanted.repo, revision=wanted.revision, **options)


def _cached(wanted: HubRequest) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                wanted.repo,
                revision=wanted.revision,
                allow_patterns=list(wanted.patterns),
                ignore_patterns=list(wanted.ignored) or None,
                local_files_only=True,
            )
        )
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
        f"{first_line(error.__cause__ or error)}",
        hint="check the network, or name a local folder",
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's words that says something, without tokens and signatures."""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return _QUERY.sub("?...", _TOKEN.sub("hf_***", said))


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def explain_gap(wanted: HubRequest, missing: str) -> SourceError:
    """Why a snapshot is not whole: the Hub was out of reach, or the repository is another kind."""
    try:
        facts = _persist(threading.Event(), partial(_facts, wanted))
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
