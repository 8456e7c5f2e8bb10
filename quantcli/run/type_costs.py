"""What each type would cost each tensor, in KL divergence, before any is chosen.

Under feedback among columns (H = (I + U) D (I + U)^T of the inputs) and rows (the same of the
outputs' Fisher information F) what remains of an error is its own part alone: with the encoder's
error e of weight (i, j) a matrix costs about ``sum_ij D'_i e_ij^2 D_j / 2``, D' being the pivots
of F. So one pass over some windows, forwards and back, and one encoding for each type tell enough
to choose by. Where a matrix is met row by row (an embedding), F is the identity's share by how
often a row is read; where it makes logits, by the variance of a token's being drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.formats import get_format, native
from quantcli.formats.base import Floats
from quantcli.layerwise.checkpoint import Checkpoint
from quantcli.layerwise.input_hooks import GradientTap, Product, Tap
from quantcli.layerwise.runner import Run, check_finite, layer_starts
from quantcli.layerwise.stream import Stream, open_stream
from quantcli.rounding.block_feedback import encode_columns
from quantcli.rounding.options import Options
from quantcli.run.layers import EMBEDDING_DAMPING
from quantcli.statistics.hessian import Hessian, prepare_hessian
from quantcli.statistics.layer_gradients import (
    FEWEST,
    LayerGradients,
    choose_windows,
    embedding_scale,
    measure_gradients,
    own_call,
    run_backwards,
)
from quantcli.statistics.layer_hessians import HessianAccumulator
from quantcli.statistics.output_fisher import OutputFisher, OutputGradientAccumulator
from quantcli.types import Event, Progress
from quantcli.workers import Workers, workers

_ROWS = 8192
"""Rows that are encoded at once."""

Candidates = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Surveyed(Event):
    """For each tensor what each of its types would cost."""

    costs: Mapping[str, Mapping[str, float]]


def survey(run: Run, candidates: Candidates, options: Options) -> Iterator[Event]:
    """Yields progress, at last `Surveyed`; ``run.folder`` keeps what was found, for a second call.

    Tensors that no gradient reaches, such as experts, have no entry.
    """
    path = run.folder / "costs.json"
    identity = {
        **run.identity, "candidates": {name: list(kinds) for name, kinds in candidates.items()},
        "options": asdict(options),
    }  # fmt: skip
    known = _read(path, identity)
    if known is not None:
        yield Surveyed(known)
        return
    torch.set_num_threads(run.threads)
    with ExitStack() as stack:
        pool = stack.enter_context(workers(run.threads))
        numbers = choose_windows(len(run.windows.ids), max(options.fisher_windows, FEWEST))
        few = replace(run, windows=replace(run.windows, ids=run.windows.ids[list(numbers)]))
        stream = open_stream(few, run.model, run.folder, Checkpoint(run.folder, {}), run.max_memory)
        work = _Survey(
            run, few, candidates, options, stack.enter_context(stream),
            LayerGradients(run.folder, numbers), pool, {},
        )  # fmt: skip
        yield from work.run()
    body = json.dumps({"identity": identity, "costs": work.costs}, default=str)
    path.write_text(body)
    yield Surveyed(work.costs)


@dataclass
class _Survey:
    whole: Run
    few: Run
    candidates: Candidates
    options: Options
    stream: Stream
    gradients: LayerGradients
    pool: Workers
    costs: dict[str, dict[str, float]]

    def run(self) -> Iterator[Event]:
        """All layers, the head and the embedding."""
        skeleton = self.stream.skeleton
        self.tensors = {tensor.name: tensor for tensor in self.whole.model.tensors}
        starts = layer_starts(self.whole.model, skeleton)
        yield from measure_gradients(skeleton, self.whole.windows.ids, self.gradients)
        for index in range(len(skeleton.layers)):
            yield Progress(starts[index], starts[-1], f"costs, layer {index}")
            self._layer(index)
        self._head()
        self._embedding()
        yield Progress(starts[-1], starts[-1], "costs")

    def _layer(self, index: int) -> None:
        skeleton, stream = self.stream.skeleton, self.stream
        rows = {name: self.tensors[name].shape[-2] for name in self.candidates}
        found = OutputGradientAccumulator(skeleton.parameters.uses, rows)
        call = own_call(stream.calls[index])
        names = skeleton.layer_parameters(index)
        with self._sums(f"layer {index}") as sums, skeleton.filled(names) as weights:
            for place, (_, gradient) in enumerate(self.gradients.of(index, skeleton)):
                sums.next_window(place)
                hidden = stream.get(place)
                with GradientTap(weights, found.observe):
                    run_backwards(skeleton, index, hidden, gradient, call)
                with Tap(weights, sums.observe):
                    hidden = skeleton.run(index, hidden, stream.calls[index])
                check_finite(hidden, f"the output of layer {index}", place)
                stream.states.put(place, hidden)
            means = found.means()
            for name in sums.names:
                known = sums.of(name, 0) if name in means else None
                if known is not None:
                    self._add(name, _row_pivots(means[name]), known.hessian, known.importance)
        stream.states.commit()

    def _head(self) -> None:
        skeleton = self.stream.skeleton
        name = self._candidate(skeleton.head_name)
        if name is None:
            return
        with self._sums("the output head") as sums:
            with skeleton.filled(skeleton.outside_layers()):
                for place in range(len(self.few.windows.ids)):
                    sums.next_window(place)
                    rows = skeleton.finish(self.stream.get(place)).flatten(0, 1)
                    sums.observe(Product(skeleton.head_name, 0, rows, (skeleton.head_name, 0)))
            known = sums.of(name, 0)
        if known is not None:
            variance = self.gradients.variance[: self.tensors[name].rows]
            self._add(name, variance, known.hessian, known.importance)

    def _embedding(self) -> None:
        skeleton = self.stream.skeleton
        name = self._candidate(skeleton.embedding_name)
        if name is None:
            return
        ids = self.few.windows.ids
        scale = embedding_scale(skeleton, ids[0]) ** 2
        fit = np.asarray(self.gradients.embedding().fit * scale, np.float32)
        hessian = prepare_hessian(fit, EMBEDDING_DAMPING, self.options.column_order)
        count = self.tensors[name].rows
        shares = np.bincount(ids.reshape(-1), minlength=count)[:count] / ids.size
        self._add(name, shares, hessian, np.ascontiguousarray(fit.diagonal()))

    def _candidate(self, parameter: str) -> str | None:
        targets = self.stream.skeleton.parameters.targets(parameter, 0)
        name = targets[0][0].name if targets else ""
        return name if name in self.candidates else None

    @contextmanager
    def _sums(self, place: str) -> Iterator[HessianAccumulator]:
        targets = self.stream.skeleton.parameters.targets
        sums = HessianAccumulator(
            targets, self.whole.folder, place, self.options.damping, self.options.column_order
        )
        try:
            yield sums
        finally:
            sums.close()

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
            rows = self.whole.model.read_floats(tensor, start, stop)
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
