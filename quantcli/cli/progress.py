"""How far the work is, on standard error: a bar on a terminal, a plain line now and then elsewhere.

Both show bytes, rate, time left and the current tensor. The rate is that of this run: bytes that
were already done at the first report (a resumed run) do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from quantcli.report.units import duration_text, percent_text, size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

FIRST_LINE_S = 5.0
LINES_GROW = 20
"""A line is due after 5 s, later after 1/20 of the time spent: a night's log stays readable."""


class Display(Protocol):
    """Shows one phase of work."""

    def update(self, done: int, total: int, tensor: str) -> None:
        """Bytes done of a total, and the tensor that was last worked on."""

    def close(self) -> None:
        """Take the display away."""


class Meter:
    """Rate and time left of one phase."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._first: int | None = None
        self.elapsed = 0.0

    def measure(self, done: int, total: int) -> str:
        """A phrase such as "1.2 GB of 9.0 GB, 310 MB/s, 25 s left"."""
        if self._first is None:
            self._first = done
        self.elapsed = self._clock() - self._start
        parts = [f"{size_text(done)} of {size_text(total)}"]
        worked = done - self._first
        if worked > 0 and self.elapsed > 0:
            rate = worked / self.elapsed
            parts.append(f"{size_text(rate)}/s")
            if done < total:
                parts.append(f"{duration_text((total - done) / rate)} left")
        return ", ".join(parts)


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

    def update(self, done: int, total: int, tensor: str) -> None:
        """Print a line when one is due, and a last one if any was printed."""
        phrase = self._meter.measure(done, total)
        if self._meter.elapsed < self._due and not (self._printed and done >= total):
            return
        self._due = self._meter.elapsed + max(FIRST_LINE_S, self._meter.elapsed / LINES_GROW)
        self._printed = done < total
        share = percent_text(done / total) if total else "100 %"
        self._write(f"{self._label}: {share}, {phrase}, {tensor}")

    def close(self) -> None:
        """Nothing stays on the screen that would have to be removed."""


class Bar:
    """A live bar that vanishes when the phase is over."""

    def __init__(self, label: str, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._label = label
        self._meter = Meter()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[phrase]}", markup=False),
            TextColumn("{task.fields[tensor]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def update(self, done: int, total: int, tensor: str) -> None:
        """Redraw; the bar appears with the first report."""
        phrase = self._meter.measure(done, total)
        if self._task is None:
            self._task = self._progress.add_task(
                self._label, total=total, completed=done, phrase=phrase, tensor=tensor
            )
            self._progress.start()
        self._progress.update(self._task, total=total, completed=done, phrase=phrase, tensor=tensor)

    def close(self) -> None:
        """Erase the bar."""
        self._progress.stop()
