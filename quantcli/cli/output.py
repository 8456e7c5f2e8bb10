"""The one sink: data to standard output, talk and progress to standard error.

Nothing below ``quantcli.cli`` prints; it returns tables and yields events, and this module knows
terminals. On a terminal tables are coloured and fitted to its width; in a pipe they are aligned
plain text that loses no character. ``NO_COLOR`` takes the colours and the bar away. Names from a
file may hold anything, escape sequences included, so control characters are shown, never sent.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.cli.progress import Bar, Display, Lines
from quantcli.report.tables import Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from quantcli.cli.failures import Failure
    from quantcli.types import Event


_LONGEST = 4000
"""Characters of a sentence on standard error; the longest lists of hints are a third of that."""


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped, as in a Python literal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shorten(text: str) -> str:
    """A sentence without its middle where a file's own words make it endless."""
    if len(text) <= _LONGEST:
        return text
    kept = _LONGEST // 2
    return f"{text[:kept]} [... {len(text) - 2 * kept:,} characters ...] {text[-kept:]}"


class Output:
    """Where a command writes. ``json``: only `document` reaches standard output.

    Of a failure without one that is the error, beside the sentence on standard error.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: bool = False,
        debug: bool = False,
        json: bool = False,
    ) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.debug = debug
        self.json = json
        self._label = "working"
        self._documented = False
        self._display: Display | None = None
        self._tells = True

    def leave_talk_to_others(self) -> None:
        """One of several processes that do the same: the first one shows what is made.

        Warnings and errors are still told.
        """
        self.quiet, self.json, self._tells = True, False, False

    # -- data -------------------------------------------------------------------------------

    @property
    def pretty(self) -> bool:
        """Whether standard output is a terminal that draws."""
        return self._stdout.is_terminal

    def table(self, table: Table) -> None:
        """Draw a table, followed by a blank line on a terminal."""
        if self.json or not table.rows or not self._tells:
            return
        if self.pretty:
            from quantcli.cli.drawing import draw

            self._stdout.print(draw(table, printable, self._stdout.width))
            self._stdout.print()
        else:
            self.line("\n".join([*_plain(table), ""]))

    def line(self, text: str = "") -> None:
        """A line of data."""
        if not self.json and self._tells:
            sys.stdout.write(text + "\n")

    def heading(self, text: str) -> None:
        """A title above the tables."""
        if self.pretty and not self.json:
            from rich.text import Text

            from quantcli.cli.drawing import shorten

            # As one name: it may have spaces.
            self._stdout.print(Text(shorten(printable(text), self._stdout.width), style="bold"))
        else:
            self.line(printable(text))

    def sentence(self, text: str) -> None:
        """A sentence of data, broken between words on a terminal."""
        if self.pretty and not self.json:
            from rich.text import Text

            line = _fold(Text(printable(text)), self._stdout.width)
            self._stdout.print(line, soft_wrap=True)
        else:
            self.line(printable(text))

    def result(self, path: Path | str) -> None:
        """The path that was made: with ``-q`` the only thing on standard output."""
        text = str(path)
        if not self._tells:
            return
        # A bar that is on the screen would take the line to standard error.
        self.close()
        if self.json or text.isascii() or not any("\udc80" <= c <= "\udcff" for c in text):
            self.line(text)
            sys.stdout.flush()
            return
        # The bytes of a name that is not UTF-8, so that a script finds the file.
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(text) + b"\n")
        sys.stdout.buffer.flush()

    def document(self, kind: str, version: int, fields: Mapping[str, Any]) -> None:
        """The command's one JSON object; ``schema`` is ``quantcli.KIND/VERSION``."""
        body = {"schema": f"quantcli.{kind}/{version}", **fields}
        indent = 2 if sys.stdout.isatty() else None
        text = json.dumps(body, ensure_ascii=False, allow_nan=False, indent=indent)
        self._documented = True
        sys.stdout.write("".join(map(_json_character, text)) if _is_odd(text) else text)
        sys.stdout.write("\n")

    # -- talk -------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A sentence for whoever watches; silent with ``-q``."""
        if not self.quiet:
            self._talk(text)

    def say_command(self, text: str) -> None:
        """A sentence that ends in a command, which stays on one line so that it can be copied."""
        if not self.quiet:
            self._talk(text, fold=False)

    def stream(self, text: str) -> None:
        """A piece of text as it comes, for whoever watches."""
        if not self.quiet:
            sys.stderr.write("".join(c if c in "\n\t" else printable(c) for c in text))
            sys.stderr.flush()

    @property
    def talks_to_a_terminal(self) -> bool:
        """Whether somebody reads what is said."""
        return not self.quiet and self._stderr.is_terminal

    def detail(self, text: str) -> None:
        """A sentence for whoever asked for more with ``-v``."""
        if self.verbose:
            self._talk(text, style="dim")

    def warn(self, text: str) -> None:
        """A warning; shown even with ``-q``, since the result may not be what was wanted."""
        self._talk(text, label="warning", style="yellow")

    def fail(self, failure: Failure) -> None:
        """The last words of a command that failed."""
        self.close()
        if self.json and not self._documented:
            fields = {"message": failure.message, "hint": failure.hint}
            self.document("error", 1, fields | {"exit_code": failure.exit_code})
        self._talk(failure.message, label="error", style="bold red")
        if failure.hint:
            self._talk(failure.hint, label="hint", style="cyan")

    # -- events -----------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        """Show what the core reports: a `Note` as a sentence, a `Progress` as a bar or lines.

        Phases name the progress; of other events the details are shown with ``-v``.
        """
        from quantcli.events import PhaseBegun, PhaseDone
        from quantcli.types import Note, Progress

        if isinstance(event, Note):
            (self.warn if event.level == "warning" else self.say)(event.message)
        elif isinstance(event, PhaseBegun):
            self.close()
            self._label = event.name
        elif isinstance(event, PhaseDone):
            self.close()
            self.detail(f"{event.name}: {event.seconds:.2f} s")
        elif isinstance(event, Progress) and not self.quiet:
            if self._display is None:
                self._display = self._new_display()
            self._display.update(replace(event, what=printable(event.what)))
        else:
            for sentence in event.details:
                self.detail(sentence)

    def close(self) -> None:
        """Take the progress display away."""
        if self._display is not None:
            self._display.close()
            self._display = None

    # -- terminals --------------------------------------------------------------------------

    @cached_property
    def _stdout(self) -> Console:
        return _console(stderr=False)

    @cached_property
    def _stderr(self) -> Console:
        return _console(stderr=True)

    def _talk(
        self, text: str, *, label: str | None = None, style: str | None = None, fold: bool = True
    ) -> None:
        from rich.text import Text

        line = Text(_shorten(printable(text)), style=style if style and not label else "")
        if label:
            line = Text.assemble((f"{label}:", style or ""), " ", line)
        if fold and self._stderr.is_terminal:
            line = _fold(line, self._stderr.width)
        self._stderr.print(line, soft_wrap=True)

    def _new_display(self) -> Display:
        console = self._stderr
        live = console.is_terminal and not console.is_dumb_terminal
        if live and not _no_color():
            return Bar(self._label, console)
        return Lines(self._label, self._talk)


def _fold(line: Text, width: int) -> Text:
    """The same with its spaces at the edge turned into line ends; a long path stays whole."""
    places, start, edge = [], 0, -1
    for place, character in enumerate(f"{line.plain} "):
        if character == "\n":
            start, edge = place + 1, -1
        elif character == " ":
            if place - start > width and edge >= 0:
                places.append(edge)
                start = edge + 1
            edge = place
    folded = "".join("\n" if n in set(places) else c for n, c in enumerate(line.plain))
    made = line.copy()
    made.plain = folded
    return made


def _is_odd(text: str) -> bool:
    return "\x7f" in text or not (text.isascii() or text.isprintable())


def _json_character(character: str) -> str:
    """What a terminal would obey rather than show, as JSON's escape."""
    if character == "\x7f":
        return "\\u007f"
    if character < "\x7f" or character.isprintable():
        return character
    return json.dumps(character)[1:-1]


def _no_color() -> bool:
    return bool(environ.get("NO_COLOR"))


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    # Left to itself, rich would still write bold and dim where colours are not wanted.
    return Console(
        stderr=stderr,
        color_system=None if _no_color() else "auto",
        highlight=False,
        markup=False,
        emoji=False,
    )


def _plain(table: Table) -> Iterator[str]:
    """Aligned text without borders; nothing is shortened."""
    cells = [tuple(map(printable, row)) for row in table.rows]
    lines = cells if table.facts else [tuple(c.header for c in table.columns), *cells]
    widths = [max(len(row[i]) for row in lines) for i in range(len(table.columns))]
    if table.title:
        yield table.title
    for row in lines:
        yield "  ".join(
            cell.rjust(width) if column.align == "right" else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        ).rstrip()
    if table.note:
        yield table.note
