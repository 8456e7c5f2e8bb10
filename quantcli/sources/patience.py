"""How long a read over the network is tried again before it is given up.

What may pass by itself (a server's 5xx and 429, a lost or silent connection, a body that ends
early) is tried again after a wait that doubles and is spread by chance, so that many readers do
not come back together; a server that says how long to wait is obeyed. Somebody who never answered
at all is given up soon: a name is misspelled more often than a network is down.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from typing import TypeVar

from quantcli.errors import SourceError

T = TypeVar("T")

ATTEMPTS = 18
"""Failures in a row after which a read is given up: about a minute."""
STRANGER_ATTEMPTS = 3
"""The same while the other side has never answered."""
FIRST_WAIT, LONGEST_WAIT = 0.2, 5.0
"""Seconds."""
LONGEST_TOLD = 600.0
"""Seconds that a server may ask us to wait."""
STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
"""HTTP statuses of what may pass by itself."""


class PassingError(Exception):
    """Something that may pass; ``wait`` are the seconds that the other side asked for."""

    def __init__(self, message: str, *, wait: float | None = None, answered: bool = True) -> None:
        super().__init__(message)
        self.wait = wait
        self.answered = answered


class StoppedError(SourceError):
    """Reading was ended from outside, by an interrupt or because the run has failed."""


@dataclass
class Patience:
    """Tries again, for all files of one place; ``stop`` ends every wait."""

    stop: threading.Event = field(default_factory=threading.Event)
    answered: bool = False

    def persist(self, attempt: Callable[[Callable[[], None]], T]) -> T:
        """What ``attempt`` returns, called again after each `PassingError`.

        It is given a function to call whenever it came forward, after which failures count from
        the start. The last PassingError is raised when patience ends; StoppedError on ``stop``.
        """
        failures = 0

        def came_forward() -> None:
            nonlocal failures
            self.answered = True
            failures = 0

        while True:
            if self.stop.is_set():
                raise StoppedError("reading was stopped")
            try:
                return attempt(came_forward)
            except PassingError as error:
                failures += 1
                self.answered |= error.answered
                if failures >= (ATTEMPTS if self.answered else STRANGER_ATTEMPTS):
                    raise
                self.stop.wait(_pause(failures, error.wait))


def _pause(failures: int, told: float | None) -> float:
    if told is not None:
        return min(told, LONGEST_TOLD) * random.uniform(1.0, 1.1)
    return min(FIRST_WAIT * 2.0 ** (failures - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)


def read_retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date. None for anything else."""
    if not value:
        return None
    try:
        told = float(value)
        return told if told > 0 else 0.0
    except ValueError:
        pass
    try:
        told = float(parsedate_to_datetime(value).timestamp())
        return told - time() if told > time() else 0.0
    except (TypeError, ValueError):
        return None
