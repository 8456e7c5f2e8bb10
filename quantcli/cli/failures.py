"""One table from exception to sentence, hint and exit code.

0 success, 1 failure, 2 usage, 3 a quality gate failed, 130 interrupted. What is not in the table
is a bug of ours and says so; its traceback is shown with ``--debug`` or ``QUANTCLI_DEBUG=1``.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass

import typer

from quantcli.errors import QuantcliError

INTERRUPTED = 130

_OS_HINTS = {
    errno.ENOENT: "check the path",
    errno.EACCES: "check the permissions of the file and its folder",
    errno.EPERM: "check the permissions of the file and its folder",
    errno.EROFS: "choose a folder on a writable disk",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some of your quota or choose another disk",
    errno.EMFILE: "raise the limit of open files, for example with 'ulimit -n 4096'",
    errno.EISDIR: "name a file, not a folder",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What the user reads, and the process's exit code."""

    message: str
    hint: str | None
    exit_code: int


def _from_own(error: QuantcliError) -> Failure:
    return Failure(error.message, error.hint, error.exit_code)


def _from_usage(error: typer.TyperException) -> Failure:
    """Typer's own complaints in our look: a lower-case sentence, the suggestion as the hint."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "quantcli"
    hint = f"see '{command} --help'"
    message, _, suggestion = message.partition(" Did you mean ")
    near = getattr(error, "possibilities", None)
    if near:
        message = getattr(error, "message", message)
        hint = f"did you mean {' or '.join(sorted(near))}?"
    elif suggestion:
        hint = "did you mean " + re.sub(r"^(.*), ", r"\1 or ", suggestion.replace("'", ""))
    message = message.strip().rstrip(".")
    return Failure(message[:1].lower() + message[1:], hint, error.exit_code)


def _from_interrupt(error: KeyboardInterrupt) -> Failure:
    return Failure("interrupted", None, INTERRUPTED)


def _from_memory(error: MemoryError) -> Failure:
    return Failure("there is not enough memory", "use fewer --threads", 1)


def _from_os(error: OSError) -> Failure:
    reason = error.strerror or str(error) or type(error).__name__
    hint = _OS_HINTS.get(error.errno or 0)
    if error.filename is None:
        return Failure(reason[:1].lower() + reason[1:], hint, 1)
    return Failure(f"{error.filename}: {reason[:1].lower()}{reason[1:]}", hint, 1)


def _from_runtime(error: RuntimeError) -> Failure:
    if "can't start new thread" not in str(error):
        return _from_bug(error)
    hint = "use fewer --threads, or raise the limits that 'ulimit -u' and 'ulimit -v' show"
    return Failure("the system starts no further thread", hint, 1)


def _from_bug(error: BaseException) -> Failure:
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Failure(
        f"internal error ({what}); this is a bug in quantcli",
        "run again with --debug for the traceback",
        1,
    )


# The first line whose class fits is taken, so the special ones stand above the general ones.
_TABLE: tuple[tuple[type[BaseException], Callable[..., Failure]], ...] = (
    (QuantcliError, _from_own),
    (typer.TyperException, _from_usage),
    (KeyboardInterrupt, _from_interrupt),
    (MemoryError, _from_memory),
    (OSError, _from_os),
    (RuntimeError, _from_runtime),
    (BaseException, _from_bug),
)


def explain(error: BaseException) -> Failure:
    """The sentence, hint and exit code for any exception."""
    return next(build(error) for kind, build in _TABLE if isinstance(error, kind))
