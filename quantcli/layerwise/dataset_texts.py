"""Texts of a data set by its name, through the ``datasets`` library: ``NAME:CONFIG:SPLIT``.

NAME is a repository of the Hub or a folder; CONFIG may be left out (``NAME:SPLIT``).
A local copy of what was loaded before is taken without a network, as that library does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantcli.errors import MissingExtraError, SourceError

INSTALL = "pip install datasets"
_COLUMNS = ("text", "messages")
_REASON = 200
"""Characters of another library's reason that fit into a sentence."""


def is_dataset(name: str) -> bool:
    """Whether a name that is no file's is meant as a data set's."""
    head, *more = name.split(":")
    return bool(head) and 0 < len(more) < 3 and bool(more[-1]) and not Path(more[-1]).suffix


def read_dataset(name: str, field: str | None) -> list[Any]:
    """The values of a column, of all rows; it is called "text" or "messages", or ``field``.

    MissingExtraError without the library, SourceError for what is not there.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"there is no file {name}, and a data set by its name needs datasets", hint=INSTALL
        ) from None
    head, *more = name.split(":")
    config, split = (more[0] or None) if len(more) == 2 else None, more[-1]
    bars = datasets.are_progress_bars_disabled()
    logger = logging.getLogger("datasets")
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        found = datasets.load_dataset(head, config, split=split)
    except Exception as error:  # it raises what its parts raise, down to the network's
        raise SourceError(
            f"the data set {name} cannot be read: {_reason(error)}",
            hint="NAME:CONFIG:SPLIT, such as wikitext:wikitext-2-raw-v1:test",
        ) from error
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
    columns: Sequence[str] = found.column_names
    chosen = field or next((each for each in _COLUMNS if each in columns), "text")
    if chosen not in columns:
        raise SourceError(
            f"the data set {name} has no column {chosen!r}",
            hint=f"--field names one of: {', '.join(columns)}",
        )
    return list(found[chosen])


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    return said if len(said) <= _REASON else said[:_REASON].rstrip() + " ..."
