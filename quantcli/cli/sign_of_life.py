"""A word on the terminal while libraries load.

torch alone takes seconds, and silence looks like a hang. The word appears when nothing was written
within a third of a second, and goes with the first output.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

AFTER_SECONDS = 0.3
_TEXT = b"starting ..."
_ERASE = b"\r\x1b[K"
_SILENT = ("-q", "--quiet", "--json")

_lock = threading.Lock()
_timer: threading.Timer | None = None
_shown = False


def show_soon(arguments: Sequence[str]) -> None:
    """Show the word soon, on a terminal that draws and unless quiet output is asked for."""
    global _timer
    draws = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if draws and not any(each in _SILENT for each in arguments):
        _timer = threading.Timer(AFTER_SECONDS, _show)
        _timer.daemon = True
        _timer.start()


def take_away() -> None:
    """Take the word away before something else is written; may be called at any time."""
    global _timer, _shown
    if _timer is None:
        return
    with _lock:
        if _timer is not None:
            _timer.cancel()
            _timer = None
        if _shown:
            _shown = False
            os.write(2, _ERASE)


def _show() -> None:
    global _shown
    with _lock:
        if _timer is not None:
            os.write(2, _TEXT)
            _shown = True
