"""What each type would cost each tensor, in KL divergence, before any is chosen.

Under feedback among columns (H = (I + U) D (I + U)^T of the inputs) and rows (the same of the
outputs' Fisher information F) what remains of an error is its own part alone: with the encoder's
error e of weight (i, j) a matrix costs about ``sum_ij D'_i e_ij^2 D_j / 2``, D' being the pivots
of F. So one pass over some windows, forwards and back, and one encoding for each type are enough
to choose by. Where nothing is fed back the diagonals of H and F take the pivots' place. An expert
costs what it does to the tokens that it gets, times their share of all. Where a matrix is met row
by row (an embedding), F is the identity's share by how often a row is read; where it makes logits,
by the variance of a token's being drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.fingerprint import sample_model
from quantcli.artifacts.staging import naming
from quantcli.events import Events
from quantcli.formats.base import Floats
from quantcli.layerwise.hidden_states import HiddenStateCache, WindowsOfRank
from quantcli.layerwise.model_run import ModelRun
from quantcli.layerwise.walk import LayerPass, LayerWalk, Visitor, open_walk
from quantcli.plan.allocate import Costs
from quantcli.rounding.base import ROUNDERS
from quantcli.rounding.options import Options
from quantcli.run.allocation_targets import Candidates
from quantcli.run.ranked_costs import add_costs, share_matrices
from quantcli.run.sample_rows import sample_rows
from quantcli.sources.imatrix import Importance
from quantcli.statistics.algebra import find_algebra
from quantcli.statistics.hessian import Hessian
from quantcli.statistics.layer_gradients import (
    EMBEDDING_DAMPING,
    LayerGradients,
    choose_windows,
    count_windows,
    embedding_fisher,
    measure_gradients,
    measure_output_fisher,
)
from quantcli.statistics.layer_hessians import HessianAccumulator
from quantcli.statistics.output_fisher import LayerFisher, OutputFisher
from quantcli.types import Event, Progress
from quantcli.workers import Workers, workers


def measure_type_costs(
    run: ModelRun, candidates: Candidates, options: Options, importance: Importance | None = None
) -> Events[Costs]:
    """For each tensor the KL divergence that each of its candidates costs.

    An ``importance`` matrix tells the inputs' mean squares, and what encoders are given, in place
    of the run's windows; it is for rounding without feedback.

    ``run.folder`` keeps the result for a second call. Tensors that no gradient reaches have no
    entry.
    """
    ranks = run.ranks
    path = (run.folder if ranks is None else ranks.folder) / "costs.json"
    identity = {
        **run.identity,
        "candidates": {
            name: {kind: codec.identity for kind, codec in kinds.items()}
            for name, kinds in candidates.items()
        },
        "options": asdict(options),
        "importance": None if importance is None else fingerprint(importance),
    }
    known = _read(path, identity)
    if ranks is not None:
        ranks.group.agree(
            {
                "the model": sample_model(run.model),
                "what is to be chosen": _as_json(
                    {k: v for k, v in identity.items() if k != "device"}
                ),
            }
        )
        known = ranks.group.gather(known)[0]
    if known is not None:
        return known
    chosen = survey_windows(run, options)
    few = replace(run, windows=replace(run.windows, ids=run.windows.ids[list(chosen)]))
    ids, numbers, places = run.windows.ids, chosen, None
    if ranks is not None:
        ids, own = run.windows.ids[list(ranks.windows.numbers)], ranks.windows.numbers
        numbers = tuple(i for i, number in enumerate(own) if number in chosen)
        places = tuple(chosen.index(own[i]) for i in numbers)
        few = replace(few, ranks=replace(ranks, windows=WindowsOfRank(places, len(chosen))))
    with (
        workers(run.threads) as pool,
        open_walk(few, run.model, run.folder, max_memory=run.max_memory, task="costs, ") as walk,
    ):
        gradients = LayerGradients(run.folder, numbers, places)
        yield from measure_gradients(walk.model, ids, gradients)
        visitor = _CostVisitor(few, candidates, options, walk, gradients, pool, importance, {})
        yield from walk.run(visitor)
        visitor.add_embedding()
    costs = visitor.costs if ranks is None else add_costs(ranks.group.gather(visitor.costs))
    if ranks is None or ranks.group.index == 0:
        with naming(path):
            path.write_text(_as_json({"identity": identity, "costs": costs}))
    return costs


def survey_windows(run: ModelRun, options: Options) -> tuple[int, ...]:
    """The numbers of the windows that costs are measured on: those that rounding sends back."""
    names = [tensor.name for tensor in run.model.tensors]
    return choose_windows(len(run.windows.ids), count_windows(options.fisher_windows, names))


def _as_json(facts: object) -> str:
    return json.dumps(facts, default=str)


@dataclass
class _CostVisitor(Visitor):
    """The visitor that adds up costs, on a walk of those windows that have gradients."""

    run: ModelRun
    candidates: Candidates
    options: Options
    walk: LayerWalk[HiddenStateCache]
    gradients: LayerGradients
    pool: Workers
    given: Importance | None
    costs: dict[str, dict[str, float]]

    def __post_init__(self) -> None:
        self.model = self.walk.model
        self.tensors = {tensor.name: tensor for tensor in self.run.model.tensors}
        self.algebra = find_algebra(self.run.device)
        self.ranks = self.run.ranks
        self.tokens = self.run.windows.ids.size
        self.feeds_back = "hessian" in ROUNDERS.get(self.options.rounder).needs

    def layer(self, layer: LayerPass) -> Iterator[Event]:
        """Windows pass back and forth; then each type's error is weighed."""
        wanted = [self.tensors[name] for name in self.candidates]
        gradients = enumerate(self.gradients.of(layer.index, self.model))
        with (
            self._accumulator(f"layer {layer.index}") as sums,
            measure_output_fisher(
                layer, gradients, wanted, self.run.folder, self.algebra.fisher
            ) as outputs,
        ):
            sums.weights = outputs.weights
            if self.ranks is not None:
                outputs.weights.add_up(self.ranks.group)
            yield from layer.forward(lambda number: sums.watch(number, self._place(number)))
            for name, matrix in self._share(sums, outputs):
                fisher, inputs = outputs.of(name, matrix), sums.of(name, matrix)
                if fisher is not None and inputs is not None:
                    share = sums.seen(name, matrix) / self.tokens
                    rows = share * self._row_weights(fisher)
                    self._add(name, rows, inputs.hessian, inputs.importance, matrix)

    def head(self) -> Iterator[Event]:
        """The output head, whose outputs are the logits."""
        name = self._candidate(self.model.head_name)
        if name is not None:
            with self._accumulator("the output head") as sums:
                for number in self.walk.windows:
                    observe = sums.watch(number, self._place(number))
                    observe(self.model.head_input(self.walk.get(number)))
                variance = self._variance()
                own = self._share(sums)
                inputs = sums.of(name, 0) if own else None
            if inputs is not None:
                rows = variance[: self.tensors[name].rows]
                self._add(name, rows, inputs.hessian, inputs.importance)
        whole = self.model.layer_starts[-1]
        yield Progress(whole, whole, "costs")

    def add_embedding(self) -> None:
        """The embedding, a row of which matters as often as it is looked up."""
        name = self._candidate(self.model.embedding_name)
        if name is None:
            return
        ids, group = self.run.windows.ids, None if self.ranks is None else self.ranks.group
        fisher = embedding_fisher(self.model, ids[0], self.gradients, group)
        if group is not None and group.index:
            return
        fit = np.asarray(fisher.fit, np.float32)
        hessian = self.algebra.prepare(fit, EMBEDDING_DAMPING, self.options.column_order)
        count = self.tensors[name].rows
        shares = np.bincount(ids.reshape(-1), minlength=count)[:count] / ids.size
        self._add(name, shares, hessian, np.ascontiguousarray(fit.diagonal()))

    def _place(self, window: int) -> int:
        """A window's number among those of all ranks."""
        return window if self.ranks is None else self.ranks.windows.numbers[window]

    def _share(
        self, sums: HessianAccumulator, outputs: LayerFisher | None = None
    ) -> list[tuple[str, int]]:
        """The candidates' matrices whose costs this process adds: all, or of several ranks its."""
        if self.ranks is not None:
            sums.settle(self.ranks.group)
        everything = [
            (name, matrix)
            for name in sums.names
            if name in self.candidates
            for matrix in range(self.tensors[name].matrices)
        ]
        if self.ranks is None:
            return everything
        return share_matrices(self.ranks.group, everything, self.tensors, sums, outputs)

    def _variance(self) -> NDArray[np.float64]:
        """The gradients' `LayerGradients.variance`, over the windows of all ranks."""
        found, count = self.gradients.variance, len(self.gradients.numbers)
        if self.ranks is None:
            return found
        found *= count / len(self.run.windows.ids)
        self.ranks.group.add_up(found)
        return found

    def _candidate(self, parameter: str) -> str | None:
        name = self.model.tensor_of(parameter)
        return name if name in self.candidates else None

    def _accumulator(self, place: str) -> HessianAccumulator:
        targets = self.model.parameters.targets
        options = self.options
        return HessianAccumulator(
            targets, self.run.folder, place, options.damping, options.column_order,
            self.algebra,
        )  # fmt: skip

    def _row_weights(self, outputs: OutputFisher) -> NDArray[np.float64]:
        """D of the outputs' F, in the order of the rows, or its diagonal without feedback."""
        if not self.feeds_back:
            return np.concatenate([mean.diagonal() for mean in outputs.means]).astype(np.float64)
        return np.concatenate([_pivots(outputs.prepare(i)) for i in range(len(outputs.means))])

    def _add(
        self, name: str, row_weights: NDArray[np.float64], hessian: Hessian, importance: Floats,
        matrix: int = 0,
    ) -> None:  # fmt: skip
        """Add what each type costs a matrix; a tied one is met twice."""
        tensor = self.tensors[name]
        if self.given is not None:
            weights = self.given.weights(name, tensor.matrices, tensor.columns)
            importance = importance if weights is None else weights[matrix % len(weights)]
        columns = _pivots(hessian) if self.feeds_back else importance.astype(np.float64)
        into = self.costs.setdefault(name, dict.fromkeys(self.candidates[name], 0.0))
        height = len(row_weights)
        runs = sample_rows(row_weights, tensor.columns * tensor.matrices)
        seen = sum(float(row_weights[start:stop].sum()) for start, stop in runs)
        scale = float(row_weights.sum()) / seen / 2 if seen > 0 else 0.0
        for start, stop in runs:
            first = matrix * height
            rows = self.run.model.read_floats(tensor, first + start, first + stop)
            for kind, codec in self.candidates[name].items():
                errors = rows - codec.decode(codec.encode(rows, importance, self.pool))
                part = float(row_weights[start:stop] @ (errors * errors) @ columns)
                into[kind] += scale * part


def fingerprint(importance: Importance) -> str:
    """Of all its values."""
    whole = hashlib.sha256()
    for name, values in sorted(importance.entries.items()):
        whole.update(f"{name}\0{values.shape}\0".encode() + np.ascontiguousarray(values).tobytes())
    return whole.hexdigest()


def _pivots(hessian: Hessian) -> NDArray[np.float64]:
    """D of a Hessian, in its matrix's own order."""
    pivots = hessian.pivots.astype(np.float64)
    if hessian.order is None:
        return pivots
    found = np.empty(len(pivots))
    found[hessian.order] = pivots
    return found


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
