"""The regular expressions of a checkpoint's settings, held against the names of its modules.

Python's engine may take for ever on an expression that repeats what repeats, and anybody may have
written it. Expressions of the usual kind are run at once; the others all together in a child
process, which has some seconds.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantcli.bounded import BoundError, call_bounded
from quantcli.errors import SourceError

SECONDS = 5.0
"""What all expressions of a checkpoint may take."""
_MEMORY = 1 << 30
_LONGEST = 256
_BROKEN = (re.error, RecursionError, OverflowError, MemoryError)


def fit_patterns(
    patterns: Iterable[str], names: Sequence[str], where: str
) -> Mapping[str, frozenset[str]]:
    """The ``names`` that each expression fits from their start.

    SourceError for what is no expression, and for those that take too long. ``where`` says where
    they stand.
    """
    deadline = time.monotonic() + SECONDS
    short = all(len(name) <= _LONGEST for name in names)
    found, hard = {}, []
    for pattern in dict.fromkeys(patterns):
        if not (short and _is_quick(pattern)):
            hard.append(pattern)
            continue
        try:
            found[pattern] = _fit(pattern, names, deadline)
        except TimeoutError as error:
            raise _too_slow(where) from error
        except _BROKEN as error:
            raise SourceError(f"{where}: {pattern!r} is no regular expression: {error}") from error
    if hard:
        found.update(_fit_hard(hard, names, where))
    return found


def _is_quick(pattern: str) -> bool:
    """Whether matching takes at most the third power of the text's length.

    True where at most three things repeat, none of them a group, and at most one thing is a group.
    """
    plain = re.sub(r"\\.", "_", pattern, flags=re.DOTALL).replace("(?", "(")
    repeats = sum(plain.count(mark) for mark in "*+{?")
    return repeats <= 3 and plain.count("(") <= 1 and not re.search(r"\)[*+{]", plain)


def _fit(pattern: str, names: Sequence[str], deadline: float = math.inf) -> frozenset[str]:
    compiled = re.compile(pattern)
    found = set()
    for name in names:
        if compiled.match(name):
            found.add(name)
        if time.monotonic() > deadline:
            raise TimeoutError
    return frozenset(found)


def _fit_hard(
    patterns: Sequence[str], names: Sequence[str], where: str
) -> Mapping[str, frozenset[str]]:
    question = {"patterns": patterns, "names": names}
    try:
        answers = call_bounded(
            "quantcli.layouts.patterns:answer", question, seconds=SECONDS, memory=_MEMORY
        )
    except BoundError as error:
        raise _too_slow(where) from error
    found = {}
    for pattern, answer in zip(patterns, answers, strict=True):
        if isinstance(answer, str):
            raise SourceError(f"{where}: {pattern!r} is no regular expression: {answer}")
        found[pattern] = frozenset(names[index] for index in answer)
    return found


def answer(question: Mapping[str, Any]) -> list[list[int] | str]:
    """The child's part: for each pattern the places of the names it fits, or what is wrong."""
    found: list[list[int] | str] = []
    for pattern in question["patterns"]:
        try:
            fits = _fit(pattern, question["names"])
            found.append([i for i, name in enumerate(question["names"]) if name in fits])
        except _BROKEN as error:
            found.append(str(error))
    return found


def _too_slow(where: str) -> SourceError:
    return SourceError(
        f"{where}: the regular expressions take more than {SECONDS:.0f} seconds to be run",
        hint="write them without repeating what repeats, or name the modules in full",
    )
