"""What each type would cost each tensor, in KL divergence, before any is chosen.

Under feedback among columns (H = (I + U) D (I + U)^T of the inputs) and rows (the same of the
outputs' Fisher information F) what remains of an error is its own part alone: with the encoder's
error e of weight (i, j) a matrix costs about ``sum_ij D'_i e_ij^2 D_j / 2``, D' being the pivots
of F. So one pass over some windows, forwards and back, and one encoding for each type are enough
to choose by. Where a matrix is met row by row (an embedding), F is the identity's share by how
often a row is read; where it makes logits, by the variance of a token's being drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantcli.events import Events
from quantcli.formats import get_format, native
from quantcli.formats.base import Floats
from quantcli.layerwise.hidden_states import HiddenStateCache
from quantcli.layerwise.model_run import ModelRun
from quantcli.layerwise.walk import LayerPass, LayerWalk, Visitor, open_walk
from quantcli.rounding.block_feedback import encode_columns
from quantcli.rounding.options import Options
from quantcli.statistics.hessian import Hessian, prepare_hessian
from quantcli.statistics.layer_gradients import (
    EMBEDDING_DAMPING,
    FEWEST,
    LayerGradients,
    choose_windows,
    embedding_fisher,
    measure_gradients,
    measure_output_fisher,
)
from quantcli.statistics.layer_hessians import HessianAccumulator
from quantcli.statistics.output_fisher import OutputFisher
from quantcli.types import Event, Progress
from quantcli.workers import Workers, workers

_ROWS = 8192
"""Rows that are encoded at once."""

TypeCosts = Mapping[str, Mapping[str, float]]
Candidates = Mapping[str, Sequence[str]]


def measure_type_costs(
    run: ModelRun, candidates: Candidates, options: Options
) -> Events[TypeCosts]:
    """For each tensor the KL divergence that each of its types costs.

    ``run.folder`` keeps the result for a second call.

    Tensors that no gradient reaches, such as experts, have no entry.
    """
    path = run.folder / "costs.json"
    identity = {
        **run.identity, "candidates": {name: list(kinds) for name, kinds in candidates.items()},
        "options": asdict(options),
    }  # fmt: skip
    known = _read(path, identity)
    if known is not None:
        return known
    numbers = choose_windows(len(run.windows.ids), max(options.fisher_windows, FEWEST))
    few = replace(run, windows=replace(run.windows, ids=run.windows.ids[list(numbers)]))
    with (
        workers(run.threads) as pool,
        open_walk(few, run.model, run.folder, max_memory=run.max_memory, task="costs, ") as walk,
    ):
        gradients = LayerGradients(run.folder, numbers)
        yield from measure_gradients(walk.model, run.windows.ids, gradients)
        visitor = _CostVisitor(run, candidates, options, walk, gradients, pool, {})
        yield from walk.run(visitor)
        visitor.add_embedding()
    body = json.dumps({"identity": identity, "costs": visitor.costs}, default=str)
    path.write_text(body)
    return visitor.costs


@dataclass
class _CostVisitor(Visitor):
    """The visitor that adds up costs, on a walk of those windows that have gradients."""

    run: ModelRun
    candidates: Candidates
    options: Options
    walk: LayerWalk[HiddenStateCache]
    gradients: LayerGradients
    pool: Workers
    costs: dict[str, dict[str, float]]

    def __post_init__(self) -> None:
        self.model = self.walk.model
        self.tensors = {tensor.name: tensor for tensor in self.run.model.tensors}

    def layer(self, layer: LayerPass) -> Iterator[Event]:
        """Windows pass back and forth; then each type's error is weighed."""
        rows = {name: self.tensors[name].shape[-2] for name in self.candidates}
        with self._accumulator(f"layer {layer.index}") as sums:
            gradients = enumerate(self.gradients.of(layer.index, self.model))
            outputs = measure_output_fisher(layer, gradients, rows)
            yield from layer.forward(sums.watch)
            for name in sums.names:
                inputs = sums.of(name, 0) if name in outputs else None
                if inputs is not None:
                    self._add(name, _row_pivots(outputs[name]), inputs.hessian, inputs.importance)

    def head(self) -> Iterator[Event]:
        """The output head, whose outputs are the logits."""
        name = self._candidate(self.model.head_name)
        if name is not None:
            with self._accumulator("the output head") as sums:
                for number in self.walk.windows:
                    sums.watch(number)(self.model.head_input(self.walk.get(number)))
                inputs = sums.of(name, 0)
            if inputs is not None:
                variance = self.gradients.variance[: self.tensors[name].rows]
                self._add(name, variance, inputs.hessian, inputs.importance)
        whole = self.model.layer_starts[-1]
        yield Progress(whole, whole, "costs")

    def add_embedding(self) -> None:
        """The embedding, a row of which matters as often as it is looked up."""
        name = self._candidate(self.model.embedding_name)
        if name is None:
            return
        ids = self.walk.ids
        fisher = embedding_fisher(self.model, ids[0], self.gradients)
        fit = np.asarray(fisher.fit, np.float32)
        hessian = prepare_hessian(fit, EMBEDDING_DAMPING, self.options.column_order)
        count = self.tensors[name].rows
        shares = np.bincount(ids.reshape(-1), minlength=count)[:count] / ids.size
        self._add(name, shares, hessian, np.ascontiguousarray(fit.diagonal()))

    def _candidate(self, parameter: str) -> str | None:
        name = self.model.tensor_of(parameter)
        return name if name in self.candidates else None

    def _accumulator(self, place: str) -> HessianAccumulator:
        targets = self.model.parameters.targets
        options = self.options
        return HessianAccumulator(
            targets, self.run.folder, place, options.damping, options.column_order
        )

    def _add(
        self, name: str, row_pivots: NDArray[np.float64], hessian: Hessian, importance: Floats
    ) -> None:
        """Add what each type costs one matrix; a tied one is met twice."""
        tensor, pivots = self.tensors[name], hessian.pivots.astype(np.float64)
        if hessian.order is not None:
            pivots[hessian.order] = hessian.pivots
        into = self.costs.setdefault(name, dict.fromkeys(self.candidates[name], 0.0))
        for start in range(0, tensor.rows, _ROWS):
            stop = min(start + _ROWS, tensor.rows)
            rows = self.run.model.read_floats(tensor, start, stop)
            for kind in into:
                fmt = get_format(kind)
                errors = rows - native.decode(fmt, encode_columns(fmt, rows, importance, self.pool))
                into[kind] += float(row_pivots[start:stop] @ (errors * errors) @ pivots) / 2


def _row_pivots(outputs: OutputFisher) -> NDArray[np.float64]:
    """D of the outputs' F, in the order of the rows."""
    parts = []
    for hessian in outputs.prepare():
        own = np.empty(len(hessian.pivots))
        own[hessian.order] = hessian.pivots
        parts.append(own)
    return np.concatenate(parts)


def _read(path: Path, identity: Mapping[str, object]) -> dict[str, dict[str, float]] | None:
    """Costs that were found before for the same question."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(body, dict) or body.get("identity") != json.loads(
        json.dumps(identity, default=str)
    ):
        return None
    costs: dict[str, dict[str, float]] = body["costs"]
    return costs
