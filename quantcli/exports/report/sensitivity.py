"""What each block would lose in each type: the costs by which types were chosen, block by block.

A cost is the KL divergence, in nats, that a tensor's rounding adds to the model's predictions, as
`quantcli.run.type_costs` estimates it; costs of tensors add up.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantcli.plan.allocate import Costs

LAYER = re.compile(r"^blk\.(\d+)\.")
_MOST = 5
"""Lines that one picture holds."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The costs of one kind (a type or scheme): ``blocks`` are (number, nats)."""

    kind: str
    blocks: tuple[tuple[int, float], ...]


def by_block(costs: Costs) -> tuple[Sensitivity, ...]:
    """Each kind that every matrix of the blocks could have, from the one that costs most on."""
    inside = {name: found for name, kinds in costs.items() if (found := LAYER.match(name))}
    if not inside:
        return ()
    common = set.intersection(*(set(costs[name]) for name in inside))
    sums: Mapping[str, dict[int, float]] = {kind: defaultdict(float) for kind in common}
    for name, found in inside.items():
        for kind in common:
            sums[kind][int(found[1])] += costs[name][kind]
    lossy = [kind for kind in common if sum(sums[kind].values()) > 0]
    ordered = sorted(lossy, key=lambda kind: (-sum(sums[kind].values()), kind))
    return tuple(Sensitivity(k, tuple(sorted(sums[k].items()))) for k in _spread(ordered))


def _spread(kinds: Sequence[str]) -> list[str]:
    """At most so many of them, the ends among them."""
    if len(kinds) <= _MOST:
        return list(kinds)
    return [kinds[round(place * (len(kinds) - 1) / (_MOST - 1))] for place in range(_MOST)]
