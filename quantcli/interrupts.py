"""What an interrupt leaves running.

Some threads can be told to stop but not be waited for: a download that hears nothing of its server
would hold up Ctrl-C for as long as the server likes.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

_LOOK_SECONDS = 0.2

asked = threading.Event()
"""Set when the user has asked to stop: threads that wait for others should end."""

left_behind = threading.Event()
"""Set where such threads were left; the process should end without waiting for them."""


_leaving: list[Callable[[], object]] = []


def before_leaving(work: Callable[[], object]) -> None:
    """Have ``work`` done when the process ends, also where it does not wait for threads."""
    if not _leaving:
        atexit.register(leave)
    _leaving.append(work)


def leave() -> None:
    """Do what is to be done before the process ends."""
    while _leaving:
        with suppress(Exception):
            _leaving.pop()()


def wait_unless_interrupted(work: Callable[[], T], stop: threading.Event) -> T:
    """What ``work`` returns or raises, done in a thread of its own.

    When waiting is interrupted, ``stop`` is set, at which the work should end, and it is left.
    """
    outcome: Future[T] = Future()

    def do() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=do, name="unwaited", daemon=True).start()
    try:
        return outcome.result()
    finally:
        if not outcome.done():
            stop.set()
            left_behind.set()


def wait_for(future: Future[T]) -> T:
    """What the future gives, waited for in any thread; InterruptedRunError once `asked` is set."""
    while True:
        try:
            return future.result(_LOOK_SECONDS)
        except TimeoutError:
            if future.done():
                raise
            if asked.is_set():
                # Imported here: this module is loaded before Ctrl-C is caught.
                from quantcli.errors import InterruptedRunError

                raise InterruptedRunError("the run was interrupted") from None
