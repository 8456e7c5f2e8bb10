"""A report's table on a terminal: colours, weights and widths for a terminal.

A terminal that is too narrow takes from the cells in this order: sentences are broken between
words, names are shortened in the middle as long as each can still be told from the others, and at
last the columns that a report can do without are left out. Headings and numbers stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from quantcli.report.tables import Column, Table

_GAP = 2
_SENTENCE, _NAME, _SHORTEST = 20, 18, 9
"""Characters below which a column of sentences or names is not narrowed, but for need."""
_LINES = 40
"""Lines of a cell; a vocabulary would take thousands."""
_CUT = "Long values are cut here; in a pipe they are whole."


def draw(table: Table, clean: Callable[[str], str], width: int) -> RenderableType:
    """The table to print in ``width`` characters; ``clean`` makes a cell safe for a terminal."""
    cells = [tuple(map(clean, row)) for row in table.rows]
    fitted = _fit(table, cells, width)
    sizes = fitted.sizes
    shown = [tuple(row[i] for i in fitted.shown) for row in cells]
    is_cut = any(
        len(cell) > n * _LINES for row in shown for cell, n in zip(row, sizes, strict=True)
    )
    parts: list[RenderableType] = []
    if table.title:
        parts.append(Text(shorten_names(clean(table.title), width), style="bold"))
    parts.append(_Grid(tuple(table.columns[i] for i in fitted.shown), sizes, shown, table.facts))
    notes = [shorten_names(clean(line), width) for line in (table.note or "").splitlines()]
    left_out = dict.fromkeys(table.columns[index].header for index in fitted.left_out)
    if left_out:
        notes.append(f"No room for: {', '.join(left_out)}.")
    if is_cut:
        notes.append(_CUT)
    if notes:
        parts.append(Text("\n".join(notes), style="dim italic"))
    return Group(*parts)


@dataclass(frozen=True)
class _Grid:
    """Rows as lines: what rich does too, in a tenth of the time for the many tensors of experts."""

    columns: Sequence[Column]
    sizes: Sequence[int]
    rows: Sequence[Sequence[str]]
    is_facts: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        dim, first = console.get_style("dim"), console.get_style("cyan")
        if not self.is_facts:
            header = [[column.header] for column in self.columns]
            yield from self._line(header, [dim] * len(self.sizes), 0)
            width = sum(self.sizes) + _GAP * (len(self.sizes) - 1)
            yield Segment("─" * width + "\n")
        plain = Style.null()
        styles = [plain] * len(self.sizes)
        if self.columns[0].align == "left":
            styles[0] = first
        for row in self.rows:
            cells = [_wrap(cell, size) for cell, size in zip(row, self.sizes, strict=True)]
            for number in range(max(map(len, cells))):
                yield from self._line(cells, styles, number)

    def _line(
        self, cells: Sequence[Sequence[str]], styles: Sequence[Style], number: int
    ) -> Iterator[Segment]:
        """Line ``number`` of each cell, which has room for its column's width."""
        for place, (lines, size, style) in enumerate(zip(cells, self.sizes, styles, strict=True)):
            text = lines[number] if number < len(lines) else ""
            blank = " " * (size - cell_len(text))
            last = place == len(self.sizes) - 1
            yield Segment(blank + text if self.columns[place].align == "right" else text, style)
            if not last:
                after = blank if self.columns[place].align == "left" else ""
                yield Segment(after + " " * _GAP)
        yield Segment("\n")


def _wrap(text: str, width: int) -> list[str]:
    """The text in lines of words, of which those that are too wide lose their middle."""
    if cell_len(text) <= width:
        return [text]
    lines = [""]
    for word in _shorten_words(_cut(text, width * _LINES), width).split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def shorten_names(sentence: str, width: int) -> str:
    """The sentence with names in it of at most half the width, so that each line has words."""
    return _shorten_words(sentence, max(_NAME, width // 2))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 2].rstrip()} …"


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
    if sum(natural) + _GAP * (len(natural) - 1) <= width:
        return _Fitted(tuple(range(len(natural))), tuple(natural))
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
    for floor in (_NAME, _SHORTEST):
        if sum(least[i] for i in shown) + _GAP * (len(shown) - 1) > width:
            # Nothing else can go, so names get alike.
            least = [
                least[i] if column.align == "right" else min(least[i], floor)
                for i, column in enumerate(table.columns)
            ]
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
    if _speaks(cells):
        return min(natural, max(cell_len(column.header), _SENTENCE))
    names, least = dict.fromkeys(cells), min(natural, max(cell_len(column.header), _NAME))
    while least < natural and not _differ(names, least):
        least += 1
    return least


def _differ(names: Iterable[str], width: int) -> bool:
    """Whether no two of the names get alike when they are shortened."""
    seen: set[str] = set()
    for name in names:
        short = shorten(name, width)
        if short in seen:
            return False
        seen.add(short)
    return True


def _speaks(cells: Sequence[str]) -> bool:
    """Whether a column holds sentences rather than names."""
    return any(cell.count(" ") > 2 for cell in cells)


def _shorten_words(text: str, width: int) -> str:
    """The text, each word of it that is wider than ``width`` shortened in the middle."""
    if all(cell_len(word) <= width for word in text.split(" ")):
        return text
    return " ".join(shorten(word, width) for word in text.split(" "))


def shorten(name: str, width: int) -> str:
    """A name in at most ``width`` characters.

    A path loses its folders, a tensor's name its ".weight"; where that is not enough its middle,
    and more of the front than of the end, which tells a file's type. At least three characters
    are left.
    """
    if cell_len(name) <= width or width < 3:
        return name
    last = name.rstrip("/").rpartition("/")[2]
    if last != name:
        return f"…/{last}" if cell_len(last) + 2 <= width else shorten(last, width)
    stem = name.removesuffix(".weight")
    if stem != name and cell_len(stem) < width:
        return f"{stem}…"
    # The front of a tensor's name tells its layer.
    share = 2 if re.search(r"\.\d+\.", name) else 3
    head = (width - 1) // share
    tail = len(name) - (width - 1 - head)
    # Some characters are two wide.
    while cell_len(name[:head]) + 1 + cell_len(name[tail:]) > width:
        if cell_len(name[:head]) > (width - 1) // share:
            head -= 1
        else:
            tail += 1
    return f"{name[:head]}…{name[tail:]}"
