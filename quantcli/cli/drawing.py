"""A report's table as a rich table: colours, weights and widths for a terminal.

A terminal that is too narrow takes from the cells in this order: sentences are broken between
words, names are shortened in the middle, and at last the columns that a report can do without are
left out. Headings and numbers stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from quantcli.report.tables import Column, Table

_GAP = 2
_SENTENCE, _NAME = 20, 12
"""Characters below which a column of sentences or names is not narrowed."""


def draw(table: Table, clean: Callable[[str], str], width: int) -> RenderableType:
    """The table to print in ``width`` characters; ``clean`` makes a cell safe for a terminal."""
    cells = [tuple(map(clean, row)) for row in table.rows]
    fitted = _fit(table, cells, width)
    grid = RichTable(
        box=None if table.facts else box.SIMPLE_HEAD,
        show_header=not table.facts,
        header_style="dim",
        show_edge=False,
        pad_edge=False,
        # The box adds one more between columns.
        padding=(0, _GAP if table.facts else _GAP - 1, 0, 0),
    )
    for place, (index, size) in enumerate(zip(fitted.shown, fitted.sizes, strict=True)):
        column = table.columns[index]
        grid.add_column(
            column.header,
            justify=column.align,
            style="cyan" if place == 0 and column.align == "left" else "",
            width=size,
            overflow="fold",
        )
    for row in cells:
        shown = zip(fitted.shown, fitted.sizes, strict=True)
        grid.add_row(*(Text(_shorten_words(row[index], size)) for index, size in shown))
    parts: list[RenderableType] = []
    if table.title:
        parts.append(Text(table.title, style="bold"))
    parts.append(grid)
    notes = [table.note] if table.note else []
    left_out = [table.columns[index].header for index in fitted.left_out]
    if left_out:
        notes.append(f"No room for: {', '.join(left_out)}.")
    if notes:
        parts.append(Text("\n".join(notes), style="dim italic"))
    return Group(*parts)


@dataclass(frozen=True)
class _Fitted:
    """Columns that are shown with their widths, and those that are left out."""

    shown: tuple[int, ...]
    sizes: tuple[int, ...]
    left_out: tuple[int, ...] = ()


def _fit(table: Table, cells: Sequence[tuple[str, ...]], width: int) -> _Fitted:
    natural = [
        _natural(column, [row[i] for row in cells]) for i, column in enumerate(table.columns)
    ]
    least = [
        _least(table, column, [row[i] for row in cells], natural[i])
        for i, column in enumerate(table.columns)
    ]
    shown = list(range(len(table.columns)))
    left_out: list[int] = []
    while sum(least[i] for i in shown) + _GAP * (len(shown) - 1) > width:
        worst = max(shown, key=lambda i: table.columns[i].drop)
        if not table.columns[worst].drop:
            break
        shown.remove(worst)
        left_out.append(worst)
    sizes = {i: natural[i] for i in shown}
    over = sum(sizes.values()) + _GAP * (len(shown) - 1) - width
    for group in (
        [i for i in shown if _speaks([row[i] for row in cells])],
        [i for i in shown if not _speaks([row[i] for row in cells])],
    ):
        while over > 0 and any(sizes[i] > least[i] for i in group):
            # The widest gives first, so that none is narrowed more than it must be.
            widest = max((i for i in group if sizes[i] > least[i]), key=lambda i: sizes[i])
            sizes[widest] -= 1
            over -= 1
    return _Fitted(tuple(shown), tuple(sizes[i] for i in shown), tuple(sorted(left_out)))


def _natural(column: Column, cells: Sequence[str]) -> int:
    return max(1, cell_len(column.header), *map(cell_len, cells)) if cells else len(column.header)


def _least(table: Table, column: Column, cells: Sequence[str], natural: int) -> int:
    """The width below which a column says nothing."""
    if column.align == "right" or (table.facts and column is table.columns[0]):
        return natural
    least = _SENTENCE if _speaks(cells) else _NAME
    return min(natural, max(cell_len(column.header), least))


def _speaks(cells: Sequence[str]) -> bool:
    """Whether a column holds sentences rather than names."""
    return any(cell.count(" ") > 2 for cell in cells)


def _shorten_words(text: str, width: int) -> str:
    """The text, each word of it that is wider than ``width`` shortened in the middle."""
    if all(cell_len(word) <= width for word in text.split(" ")):
        return text
    return " ".join(shorten(word, width) for word in text.split(" "))


def shorten(name: str, width: int) -> str:
    """A name in at most ``width`` characters: a path without its folders, else without its middle.

    Of what has no room for that at least three characters are left.
    """
    if cell_len(name) <= width or width < 3:
        return name
    last = name.rstrip("/").rpartition("/")[2]
    if last != name:
        return f"…/{last}" if cell_len(last) + 2 <= width else shorten(last, width)
    head, tail = (width - 1) // 2, len(name) - (width - 1 - (width - 1) // 2)
    # Some characters are two wide.
    while cell_len(name[:head]) + 1 + cell_len(name[tail:]) > width:
        head, tail = (head - 1, tail) if head > len(name) - tail else (head, tail + 1)
    return f"{name[:head]}…{name[tail:]}"
