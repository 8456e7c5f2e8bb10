"""Which share of the work is this process's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from quantcli.errors import UsageError

T = TypeVar("T")

ENVIRONMENT = "env"
"""The shard that ``RANK`` and ``WORLD_SIZE`` tell."""
MERGE = "merge"
"""No shard of its own: the last step alone."""

_HINT = "shards are counted from 1: --shard 1/4 to --shard 4/4"


@dataclass(frozen=True)
class Share:
    """Number ``index``, counted from 0, of ``count`` processes.

    ``together``: all run at the same time, as torchrun starts them, and wait for each other.
    Shards of a job array come in any order, and none waits. To `MERGE` is to have no share, where
    ``count`` is 0: what the others left tells it.
    """

    index: int
    count: int
    together: bool = False

    @property
    def merges(self) -> bool:
        """Whether it only checks and publishes."""
        return self.count == 0

    @property
    def speaks(self) -> bool:
        """Whether it tells what was made: of those that run together only the first does."""
        return self.index == 0 or not self.together

    @property
    def label(self) -> str:
        """What messages call it."""
        if self.merges:
            return "the merge"
        return name_of(self.index, self.count, together=self.together)

    def divide(self, sizes: Sequence[int], count: int | None = None) -> list[int]:
        """The share that takes each piece of work: the one that has had least, in order."""
        taken = [0] * max(1, count or self.count)
        owners = []
        for size in sizes:
            owner = taken.index(min(taken))
            taken[owner] += size
            owners.append(owner)
        return owners


def deal(costs: Sequence[float], count: int) -> list[int]:
    """The share, of ``count``, that takes each piece of work: the most expensive first.

    Each goes to whom it finishes earliest. It follows from the costs alone.
    """
    loads = [0.0] * count
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = loads.index(min(loads))
        loads[owner] += costs[index]
        owners[index] = owner
    return owners


def name_of(index: int, count: int, *, together: bool) -> str:
    """What messages call a share."""
    return f"rank {index}" if together else f"shard {index + 1}/{count}"


def read_share(shard: str | None, environment: Mapping[str, str] = os.environ) -> Share | None:
    """The share that ``shard`` asks for; None for the whole.

    "2/4" is the second of four, `ENVIRONMENT` takes ``RANK`` and ``WORLD_SIZE``, where they are set
    and there are several. UsageError for a number outside of its range.
    """
    if shard is None:
        return None
    if shard == MERGE:
        return Share(0, 0)
    if shard == ENVIRONMENT:
        return _from_environment(environment)
    if ranked := _from_environment(environment):
        raise UsageError(
            f"--shard {shard} is given, and RANK and WORLD_SIZE make this rank {ranked.index} of "
            f"{ranked.count}",
            hint="leave --shard out, or unset both",
        )
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if found is None:
        raise UsageError(f"--shard {shard} is not like 2/4", hint=_HINT)
    number, count = int(found[1]), int(found[2])
    if not 1 <= number <= count:
        raise UsageError(f"--shard {shard}: there is no shard {number} of {count}", hint=_HINT)
    return Share(number - 1, count) if count > 1 else None


def _from_environment(environment: Mapping[str, str]) -> Share | None:
    given = {name: environment.get(name, "").strip() for name in ("RANK", "WORLD_SIZE")}
    if not all(given.values()):
        return None
    for name, text in given.items():
        if not text.isdecimal():
            raise UsageError(
                f"{name}={text} is not a number from 0", hint="torchrun sets it; else unset it"
            )
    index, count = int(given["RANK"]), int(given["WORLD_SIZE"])
    if index >= count:
        raise UsageError(
            f"RANK={index} is outside of its range: WORLD_SIZE={count} ranks are counted from 0",
            hint="whoever starts the ranks sets both",
        )
    return Share(index, count, together=True) if count > 1 else None
