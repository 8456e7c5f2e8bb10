"""How far the work is, on standard error: a bar on a terminal, a plain line now and then elsewhere.

Both show the amount done (in bytes, or as a count of what the work consists of), rate, time left
and the current tensor. The rate is that of this run: what was already done at the first report (a
resumed run) does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from quantcli.report.units import duration_text, number_text, percent_text, size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from quantcli.types import Progress

FIRST_LINE_S = 5.0
LINES_GROW = 20
"""A line is due after 5 s, later after 1/20 of the time spent: a night's log stays readable."""


_BAR, _LEAST_NAME = 16, 8
"""Characters of the bar, and below which a name says nothing."""


class Display(Protocol):
    """Shows one phase of work."""

    def update(self, progress: Progress) -> None:
        """Show how far the work is."""

    def close(self) -> None:
        """Take the display away."""


class Meter:
    """Rate and time left of one phase, for each unit by itself: a phase may work in several.

    A count that falls has begun anew, and so does its rate.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._begun: dict[str, tuple[int, float]] = {}
        self._last: dict[str, int] = {}
        self.elapsed = 0.0

    def measure(self, progress: Progress) -> str:
        """A phrase such as "1.2 GB of 9.0 GB, 310 MB/s, 25 s left" or "14 of 16 groups"."""
        now, done, unit = self._clock(), progress.done, progress.unit
        self.elapsed = now - self._start
        if unit not in self._begun:
            # The first report comes after some work was done, not before.
            self._begun[unit] = done, self._start
        elif done < self._last[unit]:
            self._begun[unit] = done, now
        self._last[unit] = done
        first, since = self._begun[unit]
        parts = [_amount_text(done, progress.total, unit)]
        if done > first and now > since:
            rate = (done - first) / (now - since)
            parts.append(_speed_text(rate, unit))
            if done < progress.total:
                parts.append(f"{duration_text((progress.total - done) / rate)} left")
        return ", ".join(parts)


def _amount_text(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        return f"{size_text(done)} of {size_text(total)}"
    return f"{done:,} of {total:,} {unit}"


def _speed_text(rate: float, unit: str) -> str:
    if unit == "bytes":
        return f"{size_text(rate)}/s"
    if rate < 1:
        return f"{duration_text(1 / rate)} each"
    return f"{number_text(rate)} {unit}/s"


class Lines:
    """Plain lines at growing intervals; a short job prints none."""

    def __init__(
        self,
        label: str,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._write = write
        self._meter = Meter(clock)
        self._due = FIRST_LINE_S
        self._printed = False

    def update(self, progress: Progress) -> None:
        """Print a line when one is due, and a last one if any was printed."""
        phrase = self._meter.measure(progress)
        done, total = progress.done, progress.total
        if self._meter.elapsed < self._due and not (self._printed and done >= total):
            return
        self._due = self._meter.elapsed + max(FIRST_LINE_S, self._meter.elapsed / LINES_GROW)
        self._printed = done < total
        share = percent_text(done / total) if total else "100 %"
        self._write(f"{self._label}: {share}, {phrase}, {progress.what}")

    def close(self) -> None:
        """Nothing stays on the screen that would have to be removed."""


class Bar:
    """A live bar that vanishes when the phase is over."""

    def __init__(self, label: str, console: Console) -> None:
        import rich.progress
        from rich.progress import BarColumn, TextColumn

        self._label, self._console = label, console
        self._meter = Meter()
        self._bar = rich.progress.Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR),
            TextColumn("{task.fields[phrase]}", markup=False),
            TextColumn("{task.fields[what]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def update(self, progress: Progress) -> None:
        """Redraw; the bar appears with the first report."""
        from quantcli.cli.drawing import shorten

        phrase = self._meter.measure(progress)
        # What is measured stays whole, and the bar; the name of what is worked on need not.
        room = self._console.width - len(self._label) - _BAR - len(phrase) - 3
        what = shorten(progress.what, room) if room >= _LEAST_NAME else ""
        if self._task is None:
            self._task = self._bar.add_task(self._label, phrase=phrase, what=what)
            self._bar.start()
        self._bar.update(
            self._task, total=progress.total, completed=progress.done, phrase=phrase, what=what
        )

    def close(self) -> None:
        """Erase the bar."""
        self._bar.stop()
