"""Named things, loaded when first asked for.

A registry is a table ``name -> "module:attribute"``; plug-ins add lines through Python entry
points in the group ``quantcli.<kind>``. Nothing is imported until its name is looked up, so a
long table costs nothing at start-up. A plug-in that cannot be imported, or is not what its kind
asks for, is refused by its name and its distribution's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from quantcli.errors import UsageError


def near(name: str, choices: Iterable[str], *, most: int = 3) -> list[str]:
    """The choices that look like ``name``, closest first, ignoring case."""
    folded = {choice.casefold(): choice for choice in choices}
    hits = difflib.get_close_matches(name.casefold(), folded, n=most, cutoff=0.6)
    return [folded[hit] for hit in hits]


def lacks_attributes(*names: str) -> Callable[[Any], str | None]:
    """A `Registry` check: the first of ``names`` that an object does not have."""

    def check(found: Any) -> str | None:
        missing = next((name for name in names if not hasattr(found, name)), None)
        return None if missing is None else f"it has no attribute {missing!r}"

    return check


def not_callable(found: Any) -> str | None:
    """A `Registry` check for functions."""
    return None if callable(found) else "it is not a function"


class Registry:
    """A lazy, case-insensitive table of one ``kind`` of thing ("block format", "architecture").

    ``check`` returns what a plug-in's object lacks to be one, or None. Names of ``table`` cannot
    be taken over by a plug-in. What is in neither is looked up in ``base``. ``meant`` has,
    for names in lower case that somebody may take for one of the table, what is suggested.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        table: Mapping[str, str],
        check: Callable[[Any], str | None] | None = None,
        base: Registry | None = None,
        meant: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.group = f"quantcli.{group}"
        self._own = dict(table)
        self._check = check
        self._base = base
        self._meant = meant or {}
        self._loaded: dict[str, Any] = {}

    @property
    def plugins(self) -> tuple[str, ...]:
        """The names that installed distributions add."""
        return tuple(self._points)

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        points = sorted(entry_points(group=self.group), key=lambda point: point.name)
        return {point.name: point for point in points if point.name not in self._own}

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self._own, *self._points, *(self._base or ())]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return self.canonical(name) is not None

    def canonical(self, name: str) -> str | None:
        """The table's own spelling of ``name``, or None when there is no such line."""
        if name in self._own:
            return name
        names = self._names
        if name in names:
            return name
        return next((own for own in names if own.casefold() == name.casefold()), None)

    def get(self, name: str) -> Any:
        """The object behind ``name``; UsageError with near names when there is none."""
        own = self.canonical(name)
        if own is None:
            suggested = self._meant.get(name.lower())
            guesses = near(name, self._names) if suggested is None else [suggested]
            hint = (
                f"did you mean {' or '.join(guesses)}?"
                if guesses
                else ("known: " + ", ".join(self._names))
            )
            raise UsageError(f"there is no {self.kind} named {name!r}", hint=hint)
        if own not in self._loaded:
            if own in self._own:
                module, _, attribute = self._own[own].partition(":")
                self._loaded[own] = getattr(import_module(module), attribute)
            elif own in self._points or self._base is None:
                self._loaded[own] = self._load(self._points[own])
            else:
                return self._base.get(own)
        return self._loaded[own]

    def usable(self) -> Iterator[Any]:
        """The objects behind all names, those of plug-ins that `get` refuses left out."""
        for name in self:
            try:
                yield self.get(name)
            except UsageError:
                continue

    def _load(self, point: EntryPoint) -> Any:
        """The object of a plug-in; UsageError that names it and what is wrong with it."""
        home = f"{self.kind} {point.name!r} of {_distribution(point)}"
        hint = f"its entry point is {point.value} in the group {self.group}"
        try:
            found = point.load()
        except Exception as error:
            raise UsageError(
                f"the {home} cannot be loaded: {type(error).__name__}: {error}", hint=hint
            ) from error
        lack = self._check(found) if self._check is not None else None
        if lack is not None:
            raise UsageError(f"the {home} is no {self.kind}: {lack}", hint=hint)
        return found


def _distribution(point: EntryPoint) -> str:
    return "a plug-in" if point.dist is None else f"{point.dist.name} {point.dist.version}"
