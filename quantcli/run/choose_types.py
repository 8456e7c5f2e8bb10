"""Types, or schemes of modules, by what they cost: measure them, then choose within a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quantcli.artifacts.gguf_file import GgufFile
from quantcli.artifacts.model_folder import ModelFolder
from quantcli.errors import PlanError
from quantcli.events import Events
from quantcli.plan.allocate import Allocation, Costs, allocate, free_of_cost, least_bytes
from quantcli.run.allocation_targets import Candidates, Target
from quantcli.run.outputs import KindsChosen
from quantcli.types import Note

Measure = Callable[[Candidates], Events[Costs]]


def choose_types(target: Target, measure: Measure) -> Events[GgufFile | ModelFolder]:
    """The same output with a recipe that gives everything that had a choice its kind by name.

    Within the recipe's target size or bits for each weight, or the size that the output has without
    a choice. PlanError when nothing can be chosen, or the target is too small.
    """
    choices = target.choices
    if not choices:
        raise PlanError(
            f"{target.label} quantizes nothing whose {target.noun} could be chosen",
            hint=f"leave out --allocate or --quality high, or choose another {target.noun}",
        )
    # Before the long run: whether anything can be that small. The recipe in the output names what
    # is chosen, and takes bytes itself.
    smallest = allocate(choices, free_of_cost(choices), 0)
    least = target.size(target.rebuild(dict(smallest.kinds)))
    if least > target.limit:
        return (yield from _stay(target, least))
    costs = yield from measure(target.candidates)
    beside = least - smallest.nbytes
    while True:
        found = allocate(choices, costs, target.limit - beside)
        chosen = target.rebuild(dict(found.kinds))
        over = target.size(chosen) - target.limit
        if over <= 0:
            break
        if found.nbytes == least_bytes(choices, costs):
            return (yield from _stay(target, target.size(chosen)))
        beside += over
    if _is_own(target) and found.cost >= found.before:
        yield Note(f"no other {target.noun}s cost less than {target.label}'s own, which stay")
        own = target.rebuild({})
        yield _event(target, own, {choice.name: choice.own for choice in choices}, costs)
        return own
    yield _summary(target, found)
    yield _event(target, chosen, found.kinds, costs)
    return chosen


def _event(
    target: Target, made: GgufFile | ModelFolder, kinds: Mapping[str, str], costs: Costs
) -> KindsChosen:
    by_tensor = {
        tensor: kinds[choice.name]
        for choice in target.choices
        if choice.name in kinds
        for tensor in choice.tensors
    }
    return KindsChosen(made.paths, target.noun, by_tensor, costs)


def _is_own(target: Target) -> bool:
    """Whether the size is that of the output without a choice."""
    return target.recipe.target_size is None and target.recipe.target_bpw is None


def _stay(target: Target, least: int) -> Events[GgufFile | ModelFolder]:
    """Nothing fits: the output's own kinds do where the size is theirs; else PlanError."""
    if _is_own(target):
        yield Note(
            f"{target.label}'s own {target.noun}s stay: with a name for each, the smallest take "
            f"{least:,} bytes, and its own {target.limit:,}"
        )
        return target.rebuild({})
    bits = target.recipe.target_bpw
    if bits is None:
        raise PlanError(
            f"{target.limit:,} bytes are too few: with the smallest {target.noun}s the output "
            f"takes {least:,}",
            hint=f"ask for {least:,} bytes or more",
        )
    needed = -(-1000 * least * bits // target.limit) / 1000
    raise PlanError(
        f"{bits:g} bits per weight are too few: with the smallest {target.noun}s all tensors "
        f"take {needed:g}",
        hint=f"ask for {needed:g} or more",
    )


def _summary(target: Target, found: Allocation) -> Note:
    what = "tensors" if target.noun == "type" else "groups of modules"
    left = len(target.choices) - found.count
    before = sum(choice.sizes[choice.own] for choice in target.choices)
    return Note(
        f"{target.noun}s chosen for {found.count} {what}: {found.nbytes:,} bytes, for a KL "
        f"divergence of about {found.cost:.3g}; {target.label} has {before:,} there, for about "
        f"{found.before:.3g}" + (f"; {left} others keep its {target.noun}s" if left else "")
    )
