"""Types by cost: the best of all choices where they can be counted, and never above the size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.model_shapes import MODELS

from quantcli.formats import get_format
from quantcli.plan.allocate import Choice, allocate, least_bytes
from quantcli.plan.planner import Plan, make_plan
from quantcli.plan.recipe import Recipe
from quantcli.plan.type_choices import TYPES, find_type_choices, usual_types

pytestmark = pytest.mark.slow

MODEL = MODELS["llama-4-gqa"]()


def _plan(**recipe: object) -> Plan:
    shapes = {
        name: (shape[-3] if len(shape) > 2 else 1, shape[-1])
        for name, shape in MODEL.tensors.items()
        if len(shape) > 1
    }
    return make_plan(
        MODEL.output_tensors(), MODEL.metadata(), Recipe(**{"type": "Q4_K_S", **recipe}),
        importance=shapes, from_gguf=True,
    )  # fmt: skip


def _costs(names: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Costs that fall by about four for each bit, by unequal factors."""
    draw = np.random.default_rng(seed)
    found = {}
    for name in names:
        weight = float(np.exp(2 * draw.standard_normal()))
        found[name] = {
            kind: weight * 4 ** -get_format(kind).bits * float(draw.uniform(0.7, 1.4))
            for kind in TYPES
        }
    return found


def _size(plan: Plan, name: str, kind: str) -> int:
    item = next(item for item in plan.items if item.tensor.name == name)
    return plan.aligned(item.tensor.rows * get_format(kind).row_bytes(item.tensor.columns))


def _names(plan: Plan) -> list[str]:
    return [choice.name for choice in find_type_choices(plan)]


def _own_bytes(plan: Plan, choices: list[Choice]) -> int:
    return sum(_size(plan, choice.name, choice.own) for choice in choices)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_near_the_best_of_all_choices(seed: int) -> None:
    plan = _plan()
    kinds = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
    choices = [c for c in find_type_choices(plan, kinds) if c.name.startswith("blk.0.")][:7]
    names = [choice.name for choice in choices]
    costs = {
        name: {kind: each[kind] for kind in kinds} for name, each in _costs(names, seed).items()
    }
    limit = _own_bytes(plan, choices)
    found = allocate(choices, costs, limit)
    best = np.inf
    for choice in itertools.product(kinds, repeat=len(names)):
        both = list(zip(names, choice, strict=True))
        if sum(_size(plan, *pair) for pair in both) <= limit:
            best = min(best, sum(costs[name][kind] for name, kind in both))
    assert found.cost <= 1.1 * best
    assert found.cost < found.before


def test_the_size_holds_and_more_of_it_never_costs_more() -> None:
    plan = _plan()
    choices = find_type_choices(plan)
    costs = _costs([choice.name for choice in choices], 1)
    cheaper = np.inf
    for share in (0.7, 0.85, 1.0, 1.001, 1.3, 3.0):
        limit = int(share * _own_bytes(plan, choices))
        found = allocate(choices, costs, limit)
        assert set(found.kinds) == set(costs)
        whole = sum(_size(plan, name, kind) for name, kind in found.kinds.items())
        assert whole == found.nbytes <= limit
        assert found.cost <= cheaper * 1.01
        cheaper = found.cost
    assert set(found.kinds.values()) == {"Q8_0"}


def test_of_a_size_that_nothing_fits_it_makes_the_smallest() -> None:
    plan = _plan()
    choices = find_type_choices(plan)
    costs = _costs([choice.name for choice in choices], 1)
    least = sum(min(_size(plan, n, kind) for kind in TYPES) for n in costs)
    assert least_bytes(choices, costs) == least
    assert allocate(choices, costs, 0).nbytes == allocate(choices, costs, least).nbytes == least


def test_what_has_no_costs_keeps_its_own_type() -> None:
    plan = _plan()
    choices = find_type_choices(plan)
    costs = _costs([choice.name for choice in choices], 2)
    gone = {name for name in costs if "attn_v" in name}
    known = {name: each for name, each in costs.items() if name not in gone}
    found = allocate(choices, known, _own_bytes(plan, choices))
    own = {choice.name: choice.own for choice in choices}
    assert {name: found.kinds[name] for name in gone} == {name: own[name] for name in gone}
    assert found.count == len(known)
    assert sum(_size(plan, *pair) for pair in found.kinds.items()) == found.nbytes
    assert found.nbytes <= _own_bytes(plan, choices)


def test_a_choice_of_several_tensors_costs_what_they_cost_together() -> None:
    choice = Choice("qkv", "a", {"a": 10, "b": 20, "keep": 40}, ("q", "k"), lossless="keep")
    costs = {"q": {"a": 3.0, "b": 1.0}, "k": {"a": 0.5, "b": 0.25}}
    for limit, kind, cost in ((10, "a", 3.5), (25, "b", 1.25), (100, "keep", 0.0)):
        found = allocate([choice], costs, limit)
        assert (found.kinds["qkv"], found.cost, found.before) == (kind, cost, 3.5)


def test_what_is_asked_for_by_name_has_no_choice() -> None:
    every = set(_names(_plan()))
    assert {"token_embd.weight", "output.weight", "blk.0.ffn_up.weight"} <= every
    assert not any("norm" in name for name in every)
    named = _plan(
        tensor_types=("ffn_up=Q6_K",), output_tensor_type="Q8_0", token_embedding_type="Q5_K",
        keep=("first=Q8_0",),
    )  # fmt: skip
    left = set(_names(named))
    gone = {n for n in every if "ffn_up" in n or n.startswith("blk.0.")}
    assert every - left == gone | {"token_embd.weight", "output.weight"}


def test_a_file_of_one_bit_chooses_among_the_lowest_types_too() -> None:
    assert usual_types(_plan()) == TYPES
    low = _plan(type="IQ1_M")
    assert usual_types(low) == ("IQ1_S", "IQ1_M", *TYPES)
    choices = find_type_choices(low, usual_types(low))
    assert {"IQ1_S", "IQ2_XXS", "Q8_0"} <= set(choices[0].sizes)
    kinds = {choice.own for choice in choices}
    assert kinds > {"IQ1_M", "Q2_K"}
    costs = {c.name: {kind: 4.0 ** -get_format(kind).bits for kind in c.sizes} for c in choices}
    found = allocate(choices, costs, _own_bytes(low, choices))
    assert found.nbytes <= _own_bytes(low, choices)
    assert found.cost < found.before
