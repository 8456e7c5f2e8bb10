"""What a field of a recipe declares about itself, and the sections that fields belong to.

Options of the command line, refusals and the reference page are made from these declarations, so
this module imports nothing that would slow ``--help`` down; a check is named and loaded when used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Set
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal, get_args, get_origin

from quantcli.errors import UsageError


@dataclass(frozen=True, slots=True)
class Section:
    """Fields that are taken together: by every output format, or by those that name the section.

    ``title`` heads them in a help text; the fields of a ``calibrated`` one need a method.
    """

    name: str
    title: str
    everywhere: bool = False
    calibrated: bool = False


_TYPES = "Which type each tensor gets"
_METHOD = "How weights are rounded"
_FOLDERS = "Model folders (--to)"
_OUTPUT = "What is written"

BITS = Section("bits", _TYPES)
TYPES = Section("types", _TYPES)
IMPORTANCE = Section("importance", "Importance matrix", everywhere=True)
METHOD = Section("method", _METHOD, calibrated=True)
ALLOCATION = Section("allocation", _METHOD)
TRAINING = Section("training", _METHOD, calibrated=True)
GRID = Section("grid", _FOLDERS)
ACTIVATIONS = Section("activations", _FOLDERS)
OUTPUT = Section("output", _OUTPUT, everywhere=True)
GGUF = Section("gguf", _OUTPUT)
SECTIONS = (BITS, TYPES, IMPORTANCE, METHOD, ALLOCATION, TRAINING, GRID, ACTIVATIONS, OUTPUT, GGUF)
"""All sections, in the order in which a help text shows them."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field: a recipe's key, a keyword of the API and an option of the command line.

    ``usual`` is what None stands for. ``within`` is an interval of numbers, such as "(0, 1]".
    ``check`` names a function, "module:name", that takes a value, or an entry of a list, and raises
    UsageError. ``normalize`` is applied to what a flag or a
    keyword gives. ``of_method`` and ``of_field`` name a method or a field without which it means
    nothing. Of one that is ``several``, options and keywords may give a list, and each value makes
    an output of its own. ``flags`` are the spellings on the command line, the first being the one
    in messages.
    """

    name: str
    kind: Any
    default: Any
    section: Section
    help: str
    metavar: str
    flags: tuple[str, ...]
    usual: Any = None
    within: str | None = None
    check: str | None = None
    normalize: Callable[[str], Any] | None = None
    of_method: str | None = None
    of_field: str | None = None
    several: bool = False

    @property
    def flag(self) -> str:
        """The option's name in a message."""
        return self.flags[0].replace("/", " or ")

    @property
    def help_text(self) -> str:
        """The help with what None stands for."""
        return self.help if self.usual is None else f"{self.help} Default: {self.usual}."

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be, of a field that is one of a few."""
        kinds = (self.kind, *get_args(self.kind))
        return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())

    def refuse_wrong(self, value: Any) -> None:
        """UsageError unless the value, which has the field's type, makes sense by itself."""
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.flag} {value} is not one of {', '.join(self.choices)}")
        if self.within is not None and not _holds(self.within, value):
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UsageError(f"{self.flag} {shown} is out of range", hint=_limits_text(self.within))
        if self.check is not None:
            check = resolve_name(self.check)
            for entry in value if isinstance(value, tuple | list) else (value,):
                check(entry)

    def is_taken(self, names: Set[str]) -> bool:
        """Whether an output format takes it that names these sections and single fields."""
        return self.section.everywhere or bool(names & {self.section.name, self.name})


def _bounds(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _holds(interval: str, value: float) -> bool:
    low, high = _bounds(interval)
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _limits_text(interval: str) -> str:
    low, high = _bounds(interval)
    least = f"{low:g} or more" if interval[0] == "[" else f"more than {low:g}"
    if high == float("inf"):
        return least
    return f"{least}, {'at most' if interval[-1] == ']' else 'less than'} {high:g}"


def declare(
    section: Section, help: str, metavar: str = "", *, default: Any = None,
    flags: tuple[str, ...] = (), **more: Any,
) -> Any:  # fmt: skip
    """A dataclass field that carries a `Field`'s arguments; None, or not given, by default."""
    arguments = {"section": section, "help": help, "metavar": metavar, "flags": flags, **more}
    return dataclasses.field(default=default, metadata=arguments)


def read_fields(owner: type, kinds: dict[str, Any]) -> dict[str, Field]:
    """The declared fields of a dataclass, in order, by name."""
    found = {}
    for each in dataclasses.fields(owner):
        arguments = dict(each.metadata)
        arguments["flags"] = arguments["flags"] or (f"--{each.name.replace('_', '-')}",)
        found[each.name] = Field(each.name, kinds[each.name], each.default, **arguments)
    return found
