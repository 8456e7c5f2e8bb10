"""What an export ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantcli.types import Event


@dataclass(frozen=True, slots=True)
class Exported(Event):
    """The result is whole: its files (or its folder), and their bytes together."""

    paths: tuple[Path, ...]
    nbytes: int
