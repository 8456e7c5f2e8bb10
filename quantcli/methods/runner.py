"""A calibrated quantization, layer by layer: run the layer, round its weights, go on.

All windows pass a layer with its original weights while the inputs of its weights are summed, one
Hessian for each distinct input; then each of its tensors is rounded and stored. One layer's
weights and Hessians are in memory (the sums in files), whatever the model's size, and a run that
was interrupted continues with the first layer that is not yet stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.calib.checkpoint import Checkpoint
from quantcli.calib.runner import DTYPES, Run, check_finite, enter, layer_starts
from quantcli.calib.skeleton import Call, Skeleton
from quantcli.calib.states import States
from quantcli.calib.statistics import Collector
from quantcli.calib.taps import Product, Tap
from quantcli.formats import get_format, native
from quantcli.formats.base import Bytes, Floats
from quantcli.methods.hessian import prepare_hessian
from quantcli.methods.options import HELD_OUT, Options, Outcome
from quantcli.methods.rounding import Statistics, round_tensor
from quantcli.methods.store import EncodedStore
from quantcli.methods.workers import Workers, workers
from quantcli.types import Event, Note, OutputTensor, Progress

FEW = 4
"""Fewer inputs than this many times the width of a layer make its Hessian uncertain."""


@dataclass(frozen=True)
class Work:
    """What is to be rounded: the calibration run, each tensor's block format, the options."""

    run: Run
    formats: Mapping[str, str]
    options: Options

    @property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to be continued, by what to call it."""
        plan = json.dumps(dict(self.formats), sort_keys=True)
        return {
            **self.run.identity,
            "choice of types": hashlib.sha256(plan.encode()).hexdigest(),
            "method options": asdict(self.options),
        }


def round_model(work: Work, checkpoint: Checkpoint, store: EncodedStore) -> Iterator[Event]:
    """Round every tensor of ``work.formats`` that a Hessian can be had for, into ``store``.

    Yields notes, progress and an `Outcome` for each tensor. SourceError when a value is not finite.
    """
    run = work.run
    torch.set_num_threads(run.threads)
    skeleton = Skeleton(run.model, run.model.config, dtype=DTYPES[run.dtype], device=run.device)
    ids = run.windows.ids
    shape = (*ids.shape, skeleton.hidden_size)
    size = ids.size * skeleton.hidden_size * skeleton.dtype.itemsize
    in_memory = size <= run.max_memory
    for layer in range(checkpoint.done):
        store.load(layer)
    states = States(run.folder, shape, skeleton.dtype, in_memory=in_memory, turn=checkpoint.turn)
    try:
        calls = enter(run, skeleton, states, checkpoint)
        with workers(run.threads) as crew:
            layers = _Layers(work, skeleton, states, checkpoint, store, calls, crew)
            for index in range(checkpoint.done, len(skeleton.layers)):
                yield from layers.run(index)
            if checkpoint.done == len(skeleton.layers):
                yield from layers.head()
    finally:
        states.close()


@dataclass
class _Layers:
    work: Work
    skeleton: Skeleton
    states: States
    checkpoint: Checkpoint
    store: EncodedStore
    calls: list[Call]
    crew: Workers

    def __post_init__(self) -> None:
        self.tensors = {tensor.name: tensor for tensor in self.work.run.model.tensors}
        self._starts = layer_starts(self.work.run.model, self.skeleton)

    def run(self, index: int) -> Iterator[Event]:
        place = f"layer {index}"
        fit, held_out = self._collectors(place)
        windows = len(self.work.run.windows.ids)
        span = self._starts[index + 1] - self._starts[index]
        try:
            with self.skeleton.filled(self.skeleton.layer_parameters(index)) as weights:
                for number in range(windows):
                    collector = held_out if number % HELD_OUT == HELD_OUT - 1 else fit
                    collector.next_window()
                    with Tap(weights, collector.observe):
                        hidden = self.states.get(number).to(self.skeleton.device)
                        hidden = self.skeleton.run(index, hidden, self.calls[index])
                    check_finite(hidden, f"the output of layer {index}", number)
                    self.states.put(number, hidden)
                    done = self._starts[index] + span * (number + 1) // windows
                    yield Progress(done, self._starts[-1], place)
            yield from self._round(index, fit, held_out)
        finally:
            fit.close()
            held_out.close()
        self.checkpoint.commit(index + 1, self.states.commit())

    def head(self) -> Iterator[Event]:
        """The output head, whose input is the last layer's output through the final norm."""
        fit, held_out = self._collectors("the output head")
        name = self.skeleton.head_name
        windows = len(self.work.run.windows.ids)
        try:
            with self.skeleton.filled(self.skeleton.outside_layers()):
                for number in range(windows):
                    collector = held_out if number % HELD_OUT == HELD_OUT - 1 else fit
                    collector.next_window()
                    hidden = self.states.get(number).to(self.skeleton.device)
                    rows = self.skeleton.finish(hidden).flatten(0, 1)
                    collector.observe(Product(name, 0, rows, (name, 0)))
            yield from self._round(len(self.skeleton.layers), fit, held_out)
        finally:
            fit.close()
            held_out.close()
        self.checkpoint.commit(len(self.skeleton.layers) + 1, self.states.turn)

    def _collectors(self, place: str) -> tuple[Collector, Collector]:
        targets, folder = self.skeleton.parameters.targets, self.work.run.folder
        fit, held_out = folder / "fit", folder / "held-out"
        fit.mkdir(exist_ok=True)
        held_out.mkdir(exist_ok=True)
        needs = ("mean_sq", "hessian")
        return Collector(targets, needs, fit, place), Collector(targets, needs, held_out, place)

    def _round(self, layer: int, fit: Collector, held_out: Collector) -> Iterator[Event]:
        packed: dict[str, Bytes] = {}
        outcomes: list[Outcome] = []
        sums = _Sums(fit, held_out, self.work.options)
        for name in sorted(fit.entries, key=lambda name: (fit.hessian_of[name], name)):
            wanted = self.work.formats.get(name)
            if wanted is None:
                continue
            tensor = self.tensors[name]
            packed[name], outcome = round_tensor(
                name, wanted, _matrices(tensor), self._reader(tensor),
                partial(sums.of, name),
                self.work.options, self.crew,
            )  # fmt: skip
            outcomes.append(outcome)
            yield outcome
        yield from sums.notes
        self.store.save(layer, packed, outcomes)

    def _reader(self, tensor: OutputTensor) -> Any:
        model = self.work.run.model
        height = tensor.shape[-2]

        def read(matrix: int) -> Floats:
            rows = model.read_rows(tensor, matrix * height, (matrix + 1) * height)
            if rows.dtype == np.uint8:
                return native.decode(get_format(tensor.dtype), rows)
            return native.to_float32(rows)

        return read


class _Sums:
    """Means and factored Hessians of one layer's inputs, the last one kept for its neighbours."""

    def __init__(self, fit: Collector, held_out: Collector, options: Options) -> None:
        self._fit, self._held_out, self._options = fit, held_out, options
        self._last: tuple[tuple[str, int], Statistics | None] | None = None
        self.notes: list[Note] = []

    def of(self, name: str, matrix: int) -> Statistics | None:
        """What is known of matrix ``matrix``; None when the text never reached it."""
        key = (self._fit.hessian_of[name], matrix)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._prepare(*key))
        return self._last[1]

    def _prepare(self, home: str, matrix: int) -> Statistics | None:
        count = int(self._fit.entries[home].counts[matrix])
        mean = self._mean(self._fit, home, matrix)
        if mean is None:
            return None
        columns = mean.shape[1]
        if count < FEW * columns:
            # Correlations of few samples are mostly chance: the fewer, the less they count.
            share = np.float32(count / (FEW * columns))
            diagonal = mean.diagonal().copy()
            mean *= share
            np.fill_diagonal(mean, diagonal)
            self._note_few(home, matrix, count, columns)
        hessian = prepare_hessian(mean, self._options.damping, self._options.order)
        if hessian.damping > self._options.damping:
            self.notes.append(
                Note(
                    f"{home}: its Hessian needed a damping of {hessian.damping:g} instead of "
                    f"{self._options.damping:g} to be positive definite",
                    level="warning",
                )
            )
        held_out = self._mean(self._held_out, home, matrix)
        return Statistics(hessian, mean, mean if held_out is None else held_out)

    def _note_few(self, home: str, matrix: int, count: int, columns: int) -> None:
        which = home if matrix == 0 else f"{home} (matrix {matrix})"
        self.notes.append(
            Note(
                f"{which}: {count} inputs are few for {columns} columns, so correlations count "
                f"for {count / (FEW * columns):.0%}; more text would help",
                level="warning",
            )
        )

    def _mean(self, collector: Collector, home: str, matrix: int) -> NDArray[np.float32] | None:
        """The mean of x x^T; an expert's is drawn to that of all its layer's experts."""
        if home not in collector.entries:
            return None
        counts = collector.entries[home].counts
        sums = collector.hessians()[home]
        if not counts.any():
            return None
        if len(counts) == 1:
            return np.asarray(sums[0] / counts[0], np.float32)
        columns = sums.shape[1]
        everyone = sum(sums[i] for i in range(len(counts))) / counts.sum()
        mixed = (sums[matrix] + columns * everyone) / (counts[matrix] + columns)
        return np.asarray(mixed, np.float32)


def _matrices(tensor: OutputTensor) -> int:
    return tensor.shape[-3] if len(tensor.shape) > 2 else 1
