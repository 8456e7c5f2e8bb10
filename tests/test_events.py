"""Runs as generators: who drains one, and what it may still say when it is stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from quantcli.events import Events, PhaseBegun, PhaseDone, drain, in_phase, take, take_all
from quantcli.types import Event, Note, Progress


@dataclass(frozen=True, slots=True)
class Counted(Event):
    """How far something went."""

    number: int


def _count(last: int) -> Iterator[Event]:
    for number in range(last):
        yield Progress(number, last, "x")
        yield Counted(number)


def _sum(last: int) -> Events[int]:
    found = yield from in_phase("counting", take_all(_count(last), Counted))
    return sum(each.number for each in found)


def test_a_run_returns_its_result_and_shows_the_rest() -> None:
    events: list[Event] = []
    assert drain(_sum(3), events.append) == 3
    assert events[0] == PhaseBegun("counting")
    assert isinstance(events[-1], PhaseDone)
    assert [type(event) for event in events[1:-1]] == 3 * [Progress]


def test_a_result_that_is_missing_or_not_the_only_one_is_a_mistake() -> None:
    for count in (0, 2):
        with pytest.raises(RuntimeError, match=f"ended with {count} Counted"):
            drain(take(_count(count), Counted), lambda event: None)


def test_what_showing_raises_stops_the_run_which_has_the_last_word() -> None:
    closed, shown = [], []

    def work() -> Iterator[Event]:
        try:
            yield from _count(5)
        finally:
            closed.append(True)

    def run() -> Events[None]:
        try:
            yield from take_all(work(), Counted)
        except KeyboardInterrupt:
            assert closed
            yield Note("what is kept")
            raise

    def show(event: Event) -> None:
        shown.append(event)
        if isinstance(event, Progress) and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drain(run(), show)
    assert shown[-1] == Note("what is kept")


def test_an_empty_run_has_a_result() -> None:
    def nothing() -> Events[str]:
        return "done"
        yield

    assert drain(nothing(), lambda event: None) == "done"
