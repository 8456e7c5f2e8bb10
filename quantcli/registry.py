"""Named things, loaded when first asked for.

A registry is a table ``name -> "module:attribute"``; plug-ins add lines through Python entry
points in the group ``quantcli.<kind>``. Nothing is imported until its name is looked up, so a
long table costs nothing at start-up.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from quantcli.errors import UsageError


def near(name: str, choices: Iterable[str], *, most: int = 3) -> list[str]:
    """The choices that look like ``name``, closest first, ignoring case."""
    folded = {choice.casefold(): choice for choice in choices}
    hits = difflib.get_close_matches(name.casefold(), folded, n=most, cutoff=0.6)
    return [folded[hit] for hit in hits]


class Registry:
    """A lazy, case-insensitive table of one ``kind`` of thing ("block format", "architecture")."""

    def __init__(self, kind: str, group: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._group = f"quantcli.{group}"
        self._own = dict(table)
        self._loaded: dict[str, Any] = {}

    @cached_property
    def _targets(self) -> dict[str, str]:
        plugins = {point.name: point.value for point in entry_points(group=self._group)}
        return plugins | self._own

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __contains__(self, name: str) -> bool:
        return self.canonical(name) is not None

    def canonical(self, name: str) -> str | None:
        """The table's own spelling of ``name``, or None when there is no such line."""
        if name in self._targets:
            return name
        return next((own for own in self._targets if own.casefold() == name.casefold()), None)

    def get(self, name: str) -> Any:
        """The object behind ``name``; UsageError with near names when there is none."""
        own = self.canonical(name)
        if own is None:
            guesses = near(name, self._targets)
            hint = (
                f"did you mean {' or '.join(guesses)}?"
                if guesses
                else ("known: " + ", ".join(self._targets))
            )
            raise UsageError(f"there is no {self.kind} named {name!r}", hint=hint)
        if own not in self._loaded:
            module, _, attribute = self._targets[own].partition(":")
            self._loaded[own] = getattr(import_module(module), attribute)
        return self._loaded[own]
