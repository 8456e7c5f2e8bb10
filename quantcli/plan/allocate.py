"""Which kind each of several things gets when what every kind costs is known: least cost in a size.

Costs of tensors add up (to second order, for errors that are independent of each other), so with a
price on bytes each one's best kind is its own affair; the price is raised until all fit. What is
left of the size then goes where a byte buys most (Lagrangian relaxation, as in Shoham and Gersho,
1988).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Costs = Mapping[str, Mapping[str, float]]
"""By tensor and kind: what it costs, in KL divergence."""


@dataclass(frozen=True)
class Choice:
    """Something that gets one kind: a tensor its type, or modules that are run as one a scheme.

    ``own`` is the kind that it has if nothing is chosen. ``sizes`` are the bytes of each kind, and
    ``tensors`` those whose costs add up; a kind that they have no cost for, ``lossless``, has none.
    """

    name: str
    own: str
    sizes: Mapping[str, int]
    tensors: tuple[str, ...]
    lossless: str = ""

    def costs(self, found: Costs) -> dict[str, float] | None:
        """What each kind costs; None where a tensor's costs are not known."""
        if any(tensor not in found for tensor in self.tensors):
            return None
        return {
            kind: 0.0 if kind == self.lossless else sum(found[t][kind] for t in self.tensors)
            for kind in self.sizes
        }


@dataclass(frozen=True)
class Allocation:
    """The kind of each choice, how many there were costs for, what they cost, and their bytes.

    ``before`` is what their own kinds cost.
    """

    kinds: Mapping[str, str]
    count: int
    cost: float
    before: float
    nbytes: int


def free_of_cost(choices: Sequence[Choice]) -> dict[str, dict[str, float]]:
    """Costs of nothing, for the smallest that can be had."""
    return {
        tensor: dict.fromkeys(choice.sizes, 0.0) for choice in choices for tensor in choice.tensors
    }


def least_bytes(choices: Sequence[Choice], costs: Costs) -> int:
    """The fewest bytes of them all; those without costs keep their own kind."""
    return sum(
        choice.sizes[choice.own] if choice.costs(costs) is None else min(choice.sizes.values())
        for choice in choices
    )


def allocate(choices: Sequence[Choice], costs: Costs, limit: int) -> Allocation:
    """The cheapest kinds with at most ``limit`` bytes; choices without costs keep their own kind.

    The smallest, if even they are more.
    """
    known = {c.name: each for c in choices if (each := c.costs(costs)) is not None}
    kept = {c.name: c.own for c in choices if c.name not in known}
    sizes = {choice.name: choice.sizes for choice in choices}
    own = {choice.name: choice.own for choice in choices}
    fixed = sum(sizes[name][kind] for name, kind in kept.items())

    def choose(price: float) -> dict[str, str]:
        return {
            name: min(kinds, key=lambda kind: (kinds[kind] + price * sizes[name][kind], kind))
            for name, kinds in known.items()
        }

    def total(chosen: Mapping[str, str]) -> int:
        return fixed + sum(sizes[name][kind] for name, kind in chosen.items())

    low, high = 0.0, 1e-15
    while total(choose(high)) > limit:
        low, high = high, high * 4
        if high > 1e30:
            # Equal bytes at any price: take the smallest of each.
            break
    for _ in range(80):
        middle = (low + high) / 2
        if total(choose(middle)) > limit:
            low = middle
        else:
            high = middle
    chosen = choose(high)
    if total(chosen) > limit:
        chosen = {
            name: min(sizes[name], key=lambda kind: (sizes[name][kind], kind)) for name in known
        }
    _spend(chosen, known, sizes, limit - total(chosen))
    return Allocation(
        kept | chosen,
        len(known),
        sum(known[name][kind] for name, kind in chosen.items()),
        sum(known[name][own[name]] for name in known),
        total(chosen),
    )


def _spend(
    chosen: dict[str, str], costs: Costs, sizes: Mapping[str, Mapping[str, int]], left: int
) -> None:
    """Better kinds where the bytes that are left buy most, until they buy nothing."""
    while True:
        best: tuple[float, str, str, int] | None = None
        for name, kind in chosen.items():
            for other, cost in costs[name].items():
                more = sizes[name][other] - sizes[name][kind]
                gain = costs[name][kind] - cost
                if more <= left and gain > 0:
                    worth = gain / max(more, 1)
                    if best is None or (worth, name, other) > best[:3]:
                        best = worth, name, other, more
        if best is None:
            return
        chosen[best[1]] = best[2]
        left -= best[3]
