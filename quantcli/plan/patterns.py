"""``REGEX=TYPE``: block formats that a user gives to tensors by name, as ``--tensor-type`` does.

The regular expression is searched in a tensor's GGUF name, the first that is found decides.
llama.cpp lower-cases the expression because its names are lower-case; that would turn ``\\D`` (no
digit) into ``\\d``, so we ignore case instead: the same result for every expression without such a
class. The type follows the last ``=``, so ``(?=...)`` can be used. POSIX classes such as
``[[:digit:]]``, which C++ knows and Python does not, are understood.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from quantcli.errors import UsageError
from quantcli.formats import get_format

_POSIX = {
    "alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "digit": "0-9", "lower": "a-z", "upper": "A-Z",
    "xdigit": "a-fA-F0-9", "space": r"\s", "blank": r" \t", "punct": r"!-/:-@\[-`{-~",
    "w": r"\w", "d": r"\d", "s": r"\s",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorType:
    """An expression over tensor names and the block format for the tensors it is found in."""

    text: str
    regex: re.Pattern[str]
    format: str

    def matches(self, name: str) -> bool:
        """Whether the expression is found in ``name``."""
        return self.regex.search(name) is not None


def parse_tensor_type(text: str) -> TensorType:
    """Read ``REGEX=TYPE``.

    Raises UsageError when a part is missing, the type is unknown or the expression does not
    compile.
    """
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern or not name:
        raise UsageError(
            f"{text!r} is not REGEX=TYPE", hint="for example: --tensor-type 'attn_v=Q8_0'"
        )
    return TensorType(text, _compile(pattern), parse_format(name))


def check_pattern(pattern: str) -> None:
    """UsageError when a regular expression does not compile."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern} is not a regular expression: {error}") from None


def parse_format(name: str) -> str:
    """The canonical name of a block format; UsageError with near names when there is none."""
    return get_format(name.strip()).name


def first_match(patterns: Iterable[TensorType], name: str) -> TensorType | None:
    """The first pattern that is found in ``name``."""
    return next((pattern for pattern in patterns if pattern.matches(name)), None)


def _compile(pattern: str) -> re.Pattern[str]:
    def translate(found: re.Match[str]) -> str:
        if found[1] not in _POSIX:
            raise UsageError(f"--tensor-type {pattern!r}: there is no class [:{found[1]}:]")
        return _POSIX[found[1]]

    translated = re.sub(r"\[:(\w+):\]", translate, pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            return re.compile(translated, re.IGNORECASE)
    except (re.error, FutureWarning) as error:
        raise UsageError(
            f"--tensor-type {pattern!r} is not a regular expression: {error}",
            hint=r"write \[ and \. for these characters themselves",
        ) from None
