"""What a kind of input makes of a number: files, and the commands that meet them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True)
class Command:
    """Arguments of ``quantcli``; paths are relative to the trial's ``out``, beside its ``in``.

    A ``sound`` command reads what an earlier one wrote, so it must succeed.
    """

    args: tuple[str, ...]
    sound: bool = False


@dataclass(frozen=True)
class Case:
    """One trial: what was done to its input, and commands until one fails."""

    what: str
    commands: tuple[Command, ...]
    meddle: Callable[[], None] | None = None
    """Changes the files while they are read: called at the ``meddle_at``-th read of a file."""
    meddle_at: int = 0
    check: Callable[[], str | None] | None = None
    """What another reader says of the input: a fault where it is told otherwise here."""


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    ``warm`` runs once, before processes are forked, and makes in its folder the sound inputs that
    ``make`` changes; ``make(chance, folder, bases)`` writes a trial's files into ``folder``.
    """

    name: str
    warm: Callable[[Path], Any]
    make: Callable[[Random, Path, Any], Case]
    imports: tuple[str, ...] = field(default=())
    """Modules that the commands need, imported before processes are forked."""
    trials: int = 200
    """How many of them the suite runs."""


def command(*args: str | Path, sound: bool = False) -> Command:
    """A command, its paths as text."""
    return Command(tuple(map(str, args)), sound)
