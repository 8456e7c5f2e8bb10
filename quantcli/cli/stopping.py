"""Ctrl-C, and the polite kill treated like it, so that temporary files are removed.

The first signal raises KeyboardInterrupt in the main thread, the next ones are ignored. Where the
interrupt falls into a callback whose errors Python drops (the import system has such), or a library
catches it, the run would go on; so a timer looks again and again, and raises it once more until the
command ends. It is left alone while it makes its way up: what cleans up then must not be broken.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from quantcli.interrupts import asked

_LOOK_SECONDS = 0.5
_TIMES = hasattr(signal, "setitimer")
"""Windows has no such timer: an interrupt that was dropped there is not raised again."""

stopped = False
"""Whether a signal has asked us to stop; libraries may turn the interrupt into another error."""

_settled = False


def catch_signals() -> None:
    """Take interrupts, polite kills and hang-ups."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # nohup has the hang-up ignored, and so it stays.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def settle() -> None:
    """The command has ended: the interrupt has arrived and is raised no more."""
    global _settled
    _settled = True
    if _TIMES:
        signal.setitimer(signal.ITIMER_REAL, 0)


def quit_early(signum: int, frame: FrameType | None) -> None:
    """End at once, as an interrupt while nothing but modules has been loaded may."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def _stop(signum: int, frame: FrameType | None) -> None:
    global stopped
    signal.signal(signum, signal.SIG_IGN)
    if stopped:
        return
    stopped = True
    asked.set()
    if _TIMES:
        signal.signal(signal.SIGALRM, _look)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
    raise KeyboardInterrupt


def _look(signum: int, frame: FrameType | None) -> None:
    """Raise the interrupt again unless it is on its way, as an error or as the cause of one."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            return
        error = error.__context__
    if not _settled:
        raise KeyboardInterrupt
