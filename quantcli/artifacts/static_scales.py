"""Scales of a folder that are found on texts, beside what they belong to.

They are of activations, from the extremes of a matrix's inputs, and of key-value caches, from the
largest key and value of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantcli.layouts import find_layout
from quantcli.layouts.base import CacheScales, Extremes, InputScales, Patch
from quantcli.plan.folders import FolderPlan, Item
from quantcli.types import Declared


@dataclass(frozen=True)
class StaticScales:
    """What was seen: ``inputs`` by linear module; by attention module the largest key and value."""

    inputs: Mapping[str, Extremes]
    caches: Mapping[str, tuple[float, float]]


def declare_scales(plan: FolderPlan) -> list[Declared]:
    """The tensors that the plan's scales take."""
    found: list[Declared] = []
    for item in plan.static_items:
        module, inputs, dtype = item.matrix.module, *_inputs(item)
        found += _input_scales(plan).declare(module, inputs, dtype)
    for owner in plan.caches:
        cache = cache_scales(plan)
        found += cache.declare(owner.module, cache.dtype or plan.dtype)
    return found


def place_scales(plan: FolderPlan, scales: StaticScales) -> Iterator[Patch]:
    """Their values."""
    for item in plan.static_items:
        module, inputs, dtype = item.matrix.module, *_inputs(item)
        yield from _input_scales(plan).place(module, inputs, dtype, scales.inputs[module])
    for owner in plan.caches:
        cache = cache_scales(plan)
        yield from cache.place(
            owner.module, cache.dtype or plan.dtype, *scales.caches[owner.module]
        )


def _inputs(item: Item) -> tuple[Mapping[str, object], str]:
    """The settings of a matrix's activations, and the dtype of scales."""
    if item.scheme is None or item.scheme.inputs is None:
        raise ValueError(f"{item.matrix.module} has no scales of activations")
    return item.scheme.inputs, item.scheme.grid.scale_dtype


def _input_scales(plan: FolderPlan) -> InputScales:
    found = find_layout(plan.recipe.to).inputs
    if found is None:
        raise ValueError(f"--to {plan.recipe.to} has no static scales of activations")
    return found


def cache_scales(plan: FolderPlan) -> CacheScales:
    """How the layout stores the scales of a key-value cache that the plan's recipe names."""
    return find_layout(plan.recipe.to).caches[str(plan.recipe.kv_cache)]
