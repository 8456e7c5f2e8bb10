"""``PLACES=TYPE``: keep the ends of a model at a higher precision without naming tensors.

The first and the last block and the two matrices at the ends are where errors of rounding cost
most in many models. A place is short for what `--tensor-type` and its relatives say by name, and
those win where both speak.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantcli.errors import UsageError
from quantcli.plan.patterns import TensorType, parse_format
from quantcli.registry import near
from quantcli.types import OutputTensor

PLACES = ("first", "last", "head", "embeddings")


@dataclass(frozen=True, slots=True)
class Kept:
    """What places ask for: patterns for blocks, and types of the head and the embedding."""

    tensor_types: tuple[TensorType, ...] = ()
    head: str | None = None
    embeddings: str | None = None


def parse_keep(text: str) -> tuple[tuple[str, ...], str]:
    """The places and the block format of "first,last=Q8_0"; UsageError when it is not so."""
    places, equals, name = text.rpartition("=")
    if not equals or not places or not name:
        raise UsageError(
            f"--keep {text} is not PLACES=TYPE", hint="for example: --keep first,last,head=Q8_0"
        )
    found = tuple(place.strip().lower() for place in places.split(","))
    for place in found:
        if place not in PLACES:
            guess = near(place, PLACES, most=1)
            hint = f"did you mean {guess[0]}?" if guess else f"there are {', '.join(PLACES)}"
            raise UsageError(f"--keep {text}: there is no place {place!r}", hint=hint)
    return found, parse_format(name)


def resolve_keep(entries: Sequence[str], tensors: Sequence[OutputTensor]) -> Kept:
    """What ``entries`` ask of a model of these tensors; of several for a place the first wins."""
    numbers = [int(m[1]) for t in tensors if (m := re.match(r"blk\.(\d+)\.", t.name))]
    wanted: dict[str, str] = {}
    for entry in entries:
        places, kind = parse_keep(entry)
        for place in places:
            wanted.setdefault(place, kind)
    blocks = {"first": min(numbers, default=0), "last": max(numbers, default=0)}
    types = tuple(
        TensorType(f"keep {place}={wanted[place]}", re.compile(rf"^blk\.{block}\."), wanted[place])
        for place, block in blocks.items()
        if place in wanted
    )
    return Kept(types, wanted.get("head"), wanted.get("embeddings"))
