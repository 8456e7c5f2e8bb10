"""Biases that give back what rounding takes from the mean of each output: ``--correct-bias``.

A matrix W that is stored as Q puts out (W - Q) x less. Its mean over a text's inputs, (W - Q) times
their mean, is one number for each row, which llama.cpp adds where its graph takes a bias beside the
matrix; a bias that the model has is moved by it. It is the bias correction of arXiv:1906.04721,
with means from a text, and costs 4 bytes a row.

Rows are encoded once more when the bias is written, a part at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.encode_rows import encode_rows
from quantcli.errors import PlanError
from quantcli.formats import get_format, native
from quantcli.formats.base import Bytes, Floats
from quantcli.model import Model, decode_rows
from quantcli.plan.planner import Plan, TensorPlan
from quantcli.sources.imatrix import Importance
from quantcli.tensor_biases import TAKES, bias_name, takes_bias
from quantcli.types import OutputTensor

_REASON = "what rounding takes from the outputs' mean"
_AT_ONCE = 1 << 20
"""Weights that are encoded at once."""


def add_biases(plan: Plan, model: Model) -> Plan:
    """The plan with a bias behind each weight that gets one; PlanError where none can have one."""
    corrected = corrected_weights(plan, model)
    if not corrected:
        raise PlanError(
            f"--correct-bias finds no matrix to add a bias to: llama.cpp's graph of {model.arch} "
            "takes none beside what is rounded",
            hint=f"leave it out; it is for {', '.join(sorted(TAKES))}",
        )
    names = {item.tensor.name for item in plan.items}
    items: list[TensorPlan] = []
    for item in plan.items:
        items.append(item)
        bias = bias_name(item.tensor.name)
        if item.tensor.name in corrected and bias not in names:
            rows = item.tensor.rows
            tensor = OutputTensor(bias, (rows,), "F32", values=np.zeros(rows, np.float32))
            items.append(TensorPlan(tensor, "F32", _REASON, 4 * rows))
    return replace(plan, items=tuple(items))


def corrected_weights(plan: Plan, model: Model) -> dict[str, TensorPlan]:
    """The weights to correct, by name."""
    # llama.cpp does not look for biases in blocks that it leaves unused.
    unused = {tensor.name for tensor in model.mtp_tensors}
    float32 = {item.tensor.name for item in plan.items if item.format == "F32"}
    names = {item.tensor.name for item in plan.items}
    return {
        item.tensor.name: item
        for item in plan.items
        if takes_bias(model.arch, item.tensor.name)
        and item.tensor.name not in unused
        and len(item.tensor.shape) == 2
        and get_format(item.format).block > 1
        # Blocks that are copied lose nothing, and NVFP4 has its own way with scales.
        and item.format not in (item.tensor.dtype, "NVFP4")
        and (bias_name(item.tensor.name) not in names or bias_name(item.tensor.name) in float32)
    }


class BiasCorrections:
    """Encodes biases, given the ``means`` of the inputs by weight; None until they are known."""

    def __init__(
        self, model: Model, plan: Plan, importance: Importance | None,
        means: Mapping[str, Floats] | None = None,
    ) -> None:  # fmt: skip
        self._model, self._importance, self._means = model, importance, means
        weights = corrected_weights(plan, model)
        self._weights = {bias_name(name): item for name, item in weights.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The biases that it encodes."""
        return tuple(self._weights)

    def __call__(self, item: TensorPlan, start: int, rows: NDArray[Any]) -> Bytes:
        """The bias in ``rows``, zeros where there was none, with its correction."""
        own = decode_rows(item.tensor, rows).reshape(1, -1)
        corrected: Floats = (own + self._correct(self._weights[item.tensor.name])).astype("<f4")
        return corrected.view(np.uint8)

    def _correct(self, item: TensorPlan) -> NDArray[np.float64]:
        """(W - Q) times the mean input, a number for each row of a weight."""
        if self._means is None:
            raise RuntimeError("the inputs' means are not known")
        tensor, fmt = item.tensor, get_format(item.format)
        mean = self._means[tensor.name].astype(np.float64)
        found = np.zeros(tensor.rows)
        step = max(1, _AT_ONCE // tensor.columns)
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            rows = self._model.read_rows(tensor, start, stop)
            try:
                packed = encode_rows(item, start, rows, self._importance)
            except native.UnencodableError:
                # The weight's own rows are refused, with their place.
                continue
            errors = decode_rows(tensor, rows) - native.decode(fmt, packed)
            # No BLAS, whose sums may depend on threads.
            found[start:stop] = np.einsum("rc,c->r", errors, mean)
        return found
