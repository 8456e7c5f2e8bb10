"""Types by cost: the best of all choices where they can be counted, and never above the size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.model_shapes import MODELS

from quantcli.errors import PlanError
from quantcli.formats import get_format
from quantcli.plan.allocate import TYPES, allocate, find_candidates
from quantcli.plan.planner import Plan, make_plan
from quantcli.plan.recipe import Recipe

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


@pytest.mark.parametrize("seed", range(6))
def test_it_is_near_the_best_of_all_choices(seed: int) -> None:
    plan = _plan()
    kinds = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
    names = [n for n in find_candidates(plan) if n.startswith("blk.0.")][:7]
    costs = {
        name: {kind: each[kind] for kind in kinds} for name, each in _costs(names, seed).items()
    }
    found = allocate(plan, costs, plan.data_bytes)
    fixed = plan.data_bytes - sum(
        plan.aligned(item.nbytes) for item in plan.items if item.tensor.name in costs
    )
    best = np.inf
    for choice in itertools.product(kinds, repeat=len(names)):
        both = list(zip(names, choice, strict=True))
        if fixed + sum(_size(plan, *pair) for pair in both) <= plan.data_bytes:
            best = min(best, sum(costs[name][kind] for name, kind in both))
    assert found.cost <= 1.1 * best
    assert found.cost < found.before


def test_the_size_holds_and_more_of_it_never_costs_more() -> None:
    plan = _plan()
    costs = _costs(list(find_candidates(plan)), 1)
    cheaper = np.inf
    for share in (0.7, 0.85, 1.0, 1.001, 1.3, 3.0):
        limit = int(share * plan.data_bytes)
        found = allocate(plan, costs, limit)
        assert set(found.types) == set(costs)
        whole = sum(
            _size(plan, item.tensor.name, found.types[item.tensor.name])
            if item.tensor.name in costs else plan.aligned(item.nbytes)
            for item in plan.items
        )  # fmt: skip
        assert whole == found.nbytes <= limit
        assert found.cost <= cheaper * 1.01
        cheaper = found.cost
    assert set(found.types.values()) == {"Q8_0"}


def test_a_size_that_nothing_fits_is_refused() -> None:
    plan = _plan()
    costs = _costs(list(find_candidates(plan)), 1)
    with pytest.raises(PlanError, match="with the smallest types") as refused:
        allocate(plan, costs, plan.data_bytes // 4)
    least = int(str(refused.value.hint).split()[2].replace(",", ""))
    assert allocate(plan, costs, least).nbytes == least
    with pytest.raises(PlanError):
        allocate(plan, costs, least - 1)


def test_what_is_asked_for_by_name_has_no_choice() -> None:
    every = set(find_candidates(_plan()))
    assert {"token_embd.weight", "output.weight", "blk.0.ffn_up.weight"} <= every
    assert not any("norm" in name for name in every)
    named = _plan(
        tensor_types=("ffn_up=Q6_K",), output_tensor_type="Q8_0", token_embedding_type="Q5_K",
        keep=("first=Q8_0",),
    )  # fmt: skip
    left = set(find_candidates(named))
    gone = {n for n in every if "ffn_up" in n or n.startswith("blk.0.")}
    assert every - left == gone | {"token_embd.weight", "output.weight"}
