"""A report's table as a rich table: colours, weights and widths for a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from quantcli.report.tables import Table


def draw(table: Table, clean: Callable[[str], str]) -> RenderableType:
    """The table to print; ``clean`` makes a cell's text safe for a terminal."""
    grid = RichTable(
        box=None if table.facts else box.SIMPLE_HEAD,
        show_header=not table.facts,
        header_style="dim",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
    )
    for index, column in enumerate(table.columns):
        first = index == 0
        grid.add_column(
            column.header,
            justify=column.align,
            style="cyan" if first and column.align == "left" else "",
            # Names break across lines rather than losing characters that tell them apart.
            overflow="fold",
            no_wrap=table.facts and first,
        )
    for row in table.rows:
        grid.add_row(*(Text(clean(cell)) for cell in row))
    parts: list[RenderableType] = []
    if table.title:
        parts.append(Text(table.title, style="bold"))
    parts.append(grid)
    if table.note:
        parts.append(Text(table.note, style="dim italic"))
    return Group(*parts)
