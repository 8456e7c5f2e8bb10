"""Which type each tensor gets when what every type costs is known: least cost within a size.

Costs of tensors add up (to second order, for errors that are independent of each other), so with a
price on bytes each tensor's best type is its own affair; the price is raised until all fit. What is
left of the size then goes where a byte buys most (Lagrangian relaxation, as in Shoham and Gersho,
1988).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantcli.errors import PlanError
from quantcli.formats import get_format
from quantcli.plan.layer_overrides import resolve_keep
from quantcli.plan.names import EMBEDDING_NAME, HEAD_NAME
from quantcli.plan.patterns import first_match, parse_tensor_type
from quantcli.plan.planner import Plan

TYPES = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K",
    "Q6_K", "Q8_0",
)  # fmt: skip
"""Types to choose from."""

Costs = Mapping[str, Mapping[str, float]]
"""By tensor and type: what it costs, in KL divergence."""


@dataclass(frozen=True)
class Allocation:
    """A type for each tensor that had a choice, what all of them cost, and the file's data bytes.

    ``before`` is what the plan's own types cost.
    """

    types: Mapping[str, str]
    cost: float
    before: float
    nbytes: int


def find_candidates(plan: Plan, types: Sequence[str] = TYPES) -> dict[str, tuple[str, ...]]:
    """For every matrix that the plan rounds by importance: its own type and what else fits it.

    A tensor whose type the recipe asks for by name has no choice.
    """
    recipe = plan.recipe
    kept = resolve_keep(recipe.keep, [item.tensor for item in plan.items])
    patterns = (*map(parse_tensor_type, recipe.tensor_types), *kept.tensor_types)
    names = {item.tensor.name for item in plan.items}
    asked = set()
    if recipe.output_tensor_type or kept.head:
        asked.add(HEAD_NAME if HEAD_NAME in names else EMBEDDING_NAME)
    if recipe.token_embedding_type or kept.embeddings:
        asked.add(EMBEDDING_NAME)
    return {
        item.tensor.name: tuple(
            name for name in dict.fromkeys((item.format, *types))
            if get_format(name).fits(item.tensor.columns)
        )
        for item in plan.items
        if item.importance
        and len(item.tensor.shape) > 1
        and get_format(item.format).block > 1
        and item.tensor.name not in asked
        and first_match(patterns, item.tensor.name) is None
    }  # fmt: skip


def allocate(plan: Plan, costs: Costs, limit: int, *, beside: int = 0) -> Allocation:
    """The cheapest types for the tensors in ``costs`` with at most ``limit`` bytes of data in all.

    PlanError when even the smallest types need more; it speaks of the file, which has ``beside``
    bytes besides.
    """
    items = {item.tensor.name: item for item in plan.items}
    fixed = sum(plan.aligned(item.nbytes) for item in plan.items if item.tensor.name not in costs)
    sizes = {
        name: {
            kind: plan.aligned(
                items[name].tensor.rows * get_format(kind).row_bytes(items[name].tensor.columns)
            )
            for kind in kinds
        }
        for name, kinds in costs.items()
    }
    least = fixed + sum(min(each.values()) for each in sizes.values())
    if least > limit:
        raise PlanError(
            f"{limit + beside:,} bytes are too few: with the smallest types the file takes "
            f"{least + beside:,}",
            hint=f"ask for {least + beside:,} bytes or more",
        )

    def choose(price: float) -> dict[str, str]:
        return {
            name: min(kinds, key=lambda kind: (kinds[kind] + price * sizes[name][kind], kind))
            for name, kinds in costs.items()
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
        chosen = {name: min(each, key=lambda k: (each[k], k)) for name, each in sizes.items()}
    _spend(chosen, costs, sizes, limit - total(chosen))
    return Allocation(
        chosen,
        sum(costs[name][kind] for name, kind in chosen.items()),
        sum(costs[name][items[name].format] for name in costs),
        total(chosen),
    )


def _spend(
    chosen: dict[str, str], costs: Costs, sizes: Mapping[str, Mapping[str, int]], left: int
) -> None:
    """Better types where the bytes that are left buy most, until they buy nothing."""
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
