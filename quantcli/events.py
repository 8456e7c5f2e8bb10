"""How a run is followed: a generator yields events, whoever drains it shows them.

A run is a generator of events that returns its result. It may still yield when it is stopped by
an error or an interrupt, to say what is kept and how to go on; then it raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from quantcli.types import Event

T = TypeVar("T")
Done = TypeVar("Done", bound=Event)
Events = Generator[Event, None, T]
"""Yields events, returns a result."""
Show = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class PhaseBegun(Event):
    """The progress that follows belongs to this work, such as "rounding"."""

    name: str


@dataclass(frozen=True, slots=True)
class PhaseDone(Event):
    """The work is complete."""

    name: str
    seconds: float


def in_phase(name: str, work: Events[T]) -> Events[T]:
    """The same run between `PhaseBegun` and, if it ends well, `PhaseDone`."""
    begun = time.monotonic()
    yield PhaseBegun(name)
    result = yield from work
    yield PhaseDone(name, time.monotonic() - begun)
    return result


def take(events: Iterable[Event], kind: type[Done]) -> Events[Done]:
    """Yield all events but the one of ``kind``, which is returned."""
    found = yield from take_all(events, kind)
    if len(found) != 1:
        raise RuntimeError(f"a run ended with {len(found)} {kind.__name__}")
    return found[0]


def take_all(events: Iterable[Event], kind: type[Done]) -> Events[list[Done]]:
    """Yield all events but those of ``kind``, which are returned."""
    found = []
    # Closed at once when the reader stops, not when the traceback is forgotten.
    with closing(cast(Any, iter(events))) as events:
        for event in events:
            if isinstance(event, kind):
                found.append(event)
            else:
                yield event
    return found


def drain(run: Events[T], show: Show) -> T:
    """Show every event of a run; its result.

    What ``show`` raises, such as an interrupt, is raised in the run, which may have last words.
    """
    try:
        event = next(run)
        while True:
            try:
                show(event)
            except BaseException as stopped:
                event = run.throw(stopped)
            else:
                event = next(run)
    except StopIteration as ended:
        return cast(T, ended.value)
