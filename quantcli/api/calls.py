"""What the functions of the API share: refusal of unknown keywords, notes, sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import ParamSpec, TypeVar, get_type_hints

from quantcli.api.recipe_options import RecipeOptions
from quantcli.errors import UsageError
from quantcli.events import Show
from quantcli.plan.size_text import parse_size
from quantcli.registry import near
from quantcli.types import Event, Note

P = ParamSpec("P")
T = TypeVar("T")


def takes_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """The function with a `UsageError` that names the nearest keyword for one that it lacks.

    Its signature lists the keywords of a ``TypedDict`` one by one.
    """
    given = signature(function)
    parameters = [p for p in given.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    if len(parameters) < len(given.parameters):
        parameters += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in get_type_hints(RecipeOptions).items()
        ]
    known = [parameter.name for parameter in parameters]

    @wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> T:
        for name in keywords:
            if name not in known:
                guess = near(name, known, most=1)
                hint = f"did you mean {guess[0]}?" if guess else "known: " + ", ".join(known)
                raise UsageError(f"quantcli.{function.__name__} takes no {name}", hint=hint)
        return function(*args, **keywords)

    call.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


class Watch:
    """Hands events on, and keeps the notes."""

    def __init__(self, on_event: Show | None) -> None:
        self._on_event = on_event
        self.notes: list[Note] = []

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if isinstance(event, Note):
            self.notes.append(event)
        if self._on_event is not None:
            self._on_event(event)


Names = str | Path | Sequence[str | Path]
"""One name, or several."""


def as_names(given: Names) -> list[str]:
    """The names as text."""
    return [str(name) for name in ([given] if isinstance(given, str | Path) else given)]


def as_path(given: str | Path | None) -> Path | None:
    """The path, if there is one."""
    return None if given is None else Path(given)


def refuse_below_one(**counts: int | None) -> None:
    """UsageError for the first count that is less than 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"--{name} {count} is less than 1")


def parse_bytes(size: int | str | None) -> int | None:
    """Bytes as a number, or in words such as "4G"."""
    return parse_size(size) if isinstance(size, str) else size
