"""Scales of whole tensors beside the NVFP4 weights of a GGUF, where llama.cpp multiplies by them.

The plan gets a line for each, and the file two encoders: of the scale, which is found from the
largest weight when it is first asked for, and of the weights under it. Experts of a stack share a
scale, written once for each. A folder of decoded weights goes the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.largest_weights import largest_in_tensor
from quantcli.errors import PlanError
from quantcli.formats import scaled_nvfp4
from quantcli.formats.base import Bytes
from quantcli.model import Model, decode_rows
from quantcli.plan.planner import Plan, TensorPlan
from quantcli.plan.recipe import Recipe
from quantcli.sources.imatrix import Importance
from quantcli.tensor_scales import FORMAT, SCALE, WEIGHT, takes_scale
from quantcli.types import OutputTensor

_REASON = "the scale of the whole tensor"


def choose_scaled(model: Model, recipe: Recipe, formats: Mapping[str, str]) -> set[str]:
    """The tensors to make under a scale, of those that become ``formats``; none with range minmax.

    PlanError for a range where nothing becomes NVFP4.
    """
    made = [name for name, kind in formats.items() if kind == FORMAT]
    if recipe.range is not None and not made:
        raise PlanError(
            f"--range is for NVFP4 with --to {recipe.to}, and no tensor becomes that",
            hint="leave it out, or use --type NVFP4",
        )
    if recipe.range == "minmax":
        return set()
    # llama.cpp does not look for scales in blocks that it leaves unused.
    unused = {tensor.name for tensor in model.mtp_tensors}
    return {name for name in made if name not in unused and takes_scale(model.arch, name, formats)}


def add_scales(plan: Plan, model: Model) -> Plan:
    """The plan with a scale behind each weight that is made under one."""
    # Blocks that are copied keep the scale that they have.
    formats = {
        item.tensor.name: "" if item.tensor.dtype == item.format else item.format
        for item in plan.items
    }
    scaled = choose_scaled(model, plan.recipe, formats)
    items: list[TensorPlan] = []
    for item in plan.items:
        items.append(item)
        if item.tensor.name in scaled:
            count = item.tensor.matrices
            values = np.ones(count, np.float32)
            scale = OutputTensor(scale_name(item.tensor), (count,), "F32", values=values)
            items.append(TensorPlan(scale, "F32", _REASON, 4 * count))
    return replace(plan, items=tuple(items))


def scale_name(tensor: OutputTensor) -> str:
    """What the scale of a weight is called."""
    return tensor.name.removesuffix(WEIGHT) + SCALE


def scaled_tensors(plan: Plan) -> dict[str, OutputTensor]:
    """The weights that the plan makes under a scale, by their scale's name."""
    made = {item.tensor.name for item in plan.items if item.reason == _REASON}
    tensors = (item.tensor for item in plan.items if item.tensor.name not in made)
    return {scale_name(tensor): tensor for tensor in tensors if scale_name(tensor) in made}


class TensorScales:
    """The scales of tensors of a model; each is found once, from several threads."""

    def __init__(self, model: Model, names: Iterable[str]) -> None:
        self._model, wanted = model, set(names)
        self._tensors = {tensor.name: tensor for tensor in model.tensors if tensor.name in wanted}
        self._found: dict[str, float] = {}
        self._lock = Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> float:
        """That of a tensor, which is read for it."""
        with self._lock:
            if name not in self._found:
                largest = largest_in_tensor(self._model, self._tensors[name])
                self._found[name] = scaled_nvfp4.tensor_scale(largest)
            return self._found[name]


class ScaledWeights:
    """Encodes tensors under their scales, and the scales."""

    def __init__(self, model: Model, plan: Plan, importance: Importance | None) -> None:
        self._importance = importance
        by_scale = scaled_tensors(plan)
        self._tensors = by_scale | {tensor.name: tensor for tensor in by_scale.values()}
        self._scales = TensorScales(model, self._tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that it encodes."""
        return tuple(self._tensors)

    def __call__(self, item: TensorPlan, start: int, rows: NDArray[Any]) -> Bytes:
        """Packed rows of a tensor from a row on."""
        tensor = self._tensors[item.tensor.name]
        scale = self._scales[tensor.name]
        if tensor.name != item.tensor.name:
            return np.full((1, tensor.matrices), scale, np.float32).view(np.uint8)
        weights = None
        if self._importance is not None and item.importance:
            count = tensor.matrices
            weights = self._importance.weights(tensor.name, count, tensor.columns)
            weights = None if weights is None else weights[start * count // tensor.rows]
        return scaled_nvfp4.encode(decode_rows(tensor, rows), scale, weights)
