"""A table as data: what the reports make and the command line draws.

Reports decide which rows and columns a reader needs; colours, borders and widths depend on the
terminal and belong to `quantcli.cli.output`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Align = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and how its cells stand; numbers go right so that digits line up.

    On a terminal that is too narrow columns with a ``drop`` are left out, the highest first.
    """

    header: str
    align: Align = "left"
    drop: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of finished text. ``facts`` marks a two-column list of label and value, unheaded."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str | None = None
    note: str | None = None
    facts: bool = False


def facts(rows: list[tuple[str, str]], title: str | None = None) -> Table:
    """Labels and values, one pair a line."""
    return Table((Column(""), Column("")), tuple(rows), title=title, facts=True)
