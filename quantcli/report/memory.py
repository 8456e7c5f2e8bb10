"""What the weights alone occupy at a given precision: the first thing that an owner asks.

Nothing but weights times bits; a real file is larger by its scales, which `quantcli.plan.sizes`
counts exactly for every type.
"""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS: tuple[tuple[str, int], ...] = (
    ("float32", 32),
    ("bfloat16", 16),
    ("int8", 8),
    ("int4", 4),
    ("int3", 3),
    ("int2", 2),
)


@dataclass(frozen=True, slots=True)
class Precision:
    """A number format, its bits per weight, and the bytes of all weights in it."""

    name: str
    bits: int
    nbytes: int


def memory_table(parameters: int) -> tuple[Precision, ...]:
    """The bytes of ``parameters`` weights in each precision, rounded up."""
    return tuple(Precision(name, bits, -(-parameters * bits // 8)) for name, bits in PRECISIONS)
