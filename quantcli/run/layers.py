"""A calibrated quantization, layer by layer: run the layer, round its weights, go on.

All windows pass a layer with its original weights while the inputs of its weights are summed, one
Hessian for each distinct input; then each of its tensors is rounded and stored. One layer's
weights and Hessians are in memory (the sums in files), whatever the model's size, and a run that
was interrupted continues with the first layer that is not yet stored.

With ``propagate`` a second stream of hidden states goes through the layers as they were quantized,
and each layer is fitted to give the original outputs from that stream's inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from quantcli.formats.base import Bytes, Floats
from quantcli.layerwise.checkpoint import Checkpoint
from quantcli.layerwise.input_hooks import GradientTap, Product, Tap
from quantcli.layerwise.runner import Run, check_finite, layer_starts
from quantcli.layerwise.stream import Stream, matrix_reader, open_stream
from quantcli.rounding.base import ROUNDERS, Rounder
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.options import Options, Outcome
from quantcli.rounding.quantized_model import quantized_model
from quantcli.rounding.run_store import EncodedStore
from quantcli.rounding.tensor import round_tensor
from quantcli.statistics.hessian import prepare_hessian
from quantcli.statistics.layer_gradients import (
    FEWEST,
    EmbeddingFisher,
    LayerGradients,
    choose_windows,
    embedding_scale,
    measure_gradients,
    own_call,
    run_backwards,
)
from quantcli.statistics.layer_hessians import HessianAccumulator
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.statistics.output_fisher import OutputFisher, OutputGradientAccumulator
from quantcli.training.base import TRAINERS, RoundedLayer, Trainer
from quantcli.training.end_to_end import Task, train_end_to_end
from quantcli.types import Event, OutputTensor, Progress
from quantcli.workers import Workers, workers

EMBEDDING_DAMPING = 0.1
"""Of the embedding's Hessian, which is a mean over gradients."""


@dataclass(frozen=True)
class Work:
    """What is to be rounded: the calibration run, codecs by tensor, the options."""

    run: Run
    codecs: Mapping[str, WeightCodec]
    options: Options
    every_codec: Mapping[str, WeightCodec]
    """Also of tensors that no product meets, such as embeddings."""
    gradients: Path
    """The folder that gradients are in, or will be."""

    @property
    def rounder(self) -> Rounder:
        """What chooses the codes."""
        found: Rounder = ROUNDERS.get(self.options.rounder)
        return found

    @property
    def trainer(self) -> Trainer | None:
        """What trains each layer that was rounded."""
        name = self.options.trainer
        return None if name is None else TRAINERS.get(name)

    @property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to be continued, by what to call it."""
        plan = json.dumps(
            {name: codec.identity for name, codec in self.every_codec.items()}, sort_keys=True
        )
        return {
            **self.run.identity,
            "choice of types": hashlib.sha256(plan.encode()).hexdigest(),
            "method options": asdict(self.options),
        }


def round_model(work: Work, checkpoint: Checkpoint, store: EncodedStore) -> Iterator[Event]:
    """Round every tensor of ``work.codecs`` that a Hessian can be had for, into ``store``.

    Yields notes, progress and an `Outcome` for each tensor. SourceError when a value is not finite.
    """
    run = work.run
    torch.set_num_threads(run.threads)
    for layer in range(checkpoint.done):
        store.load(layer)
    with ExitStack() as stack:
        pool = stack.enter_context(workers(run.threads))
        # A layer that is tuned needs its windows' inputs after they went through it.
        memory = 0 if work.options.trainer else run.max_memory
        stream = stack.enter_context(open_stream(run, run.model, run.folder, checkpoint, memory))
        layers = _Layers(work, stream, checkpoint, store, pool)
        # First of all, so that a quantized prefix begins with what it will begin with.
        yield from layers.embedding()
        if work.options.propagate:
            folder = run.folder / "quantized"
            folder.mkdir(exist_ok=True)
            model = quantized_model(run.model, work.every_codec, store)
            prefix = open_stream(run, model, folder, checkpoint, run.max_memory)
            layers.prefix = stack.enter_context(prefix)
        count = len(stream.skeleton.layers)
        for index in range(checkpoint.done, count):
            yield from layers.run(index)
        if checkpoint.done == count:
            yield from layers.head()
        if work.options.e2e:
            task = Task(run, work.every_codec, store, stream.skeleton, stream.states.get)
            yield from train_end_to_end(task, work.options.e2e_steps)


@dataclass
class _Layers:
    work: Work
    stream: Stream
    checkpoint: Checkpoint
    store: EncodedStore
    pool: Workers
    prefix: Stream | None = None

    def __post_init__(self) -> None:
        self.skeleton = self.stream.skeleton
        self.tensors = {tensor.name: tensor for tensor in self.work.run.model.tensors}
        self._starts = layer_starts(self.work.run.model, self.skeleton)
        windows = max(self.work.options.fisher_windows, FEWEST)
        numbers = choose_windows(len(self.work.run.windows.ids), windows)
        self.gradients = LayerGradients(self.work.gradients, numbers)
        self._measured = False

    def run(self, index: int) -> Iterator[Event]:
        """One layer: all windows pass, its tensors are rounded, its weights go."""
        place = f"layer {index}"
        windows = len(self.work.run.windows.ids)
        span = self._starts[index + 1] - self._starts[index]
        with self._sums(place) as sums:
            with self.skeleton.filled(self.skeleton.layer_parameters(index)) as weights:
                # Before the windows' hidden states give way to the next layer's.
                outputs = yield from self._outputs(index, weights)
                for number in range(windows):
                    self._pass(index, number, weights, sums)
                    done = self._starts[index] + span * (number + 1) // windows
                    yield Progress(done, self._starts[-1], place)
            known = partial(_with_outputs, sums.of, outputs)
            yield from self._round(index, sums.names, known, self.work.trainer)
            yield from sums.notes
        turn = self.stream.states.commit()
        if self.prefix is not None:
            self._advance(index, self.prefix)
            self.prefix.states.commit()
        self.checkpoint.commit(index + 1, turn)

    def _pass(
        self, index: int, number: int, weights: Mapping[str, torch.Tensor], sums: HessianAccumulator
    ) -> None:
        """One window through the layer's original weights, from both streams' inputs."""
        sums.next_window(number)
        observe = sums.observe if self.prefix is None else sums.remember
        with Tap(weights, observe):
            hidden = self.skeleton.run(index, self.stream.get(number), self.stream.calls[index])
        check_finite(hidden, f"the output of layer {index}", number)
        self.stream.states.put(number, hidden)
        if self.prefix is not None:
            with Tap(weights, sums.compare):
                self.skeleton.run(index, self.prefix.get(number), self.stream.calls[index])

    def _outputs(
        self, index: int, weights: Mapping[str, torch.Tensor]
    ) -> Generator[Event, None, dict[str, OutputFisher]]:
        """What predictions make of the outputs of a layer that is filled, by tensor."""
        options = self.work.options
        if not ("fisher" in self.work.rounder.needs and options.fisher_windows):
            return {}
        yield from self._measure()
        rows = {
            name: self.tensors[name].shape[-2]
            for name, codec in self.work.codecs.items()
            if codec.by_rows and _shares_outputs(self.tensors[name])
        }
        found = OutputGradientAccumulator(self.skeleton.parameters.uses, rows)
        call = own_call(self.stream.calls[index])
        for number, gradient in self.gradients.of(index, self.skeleton):
            with GradientTap(weights, found.observe):
                run_backwards(self.skeleton, index, self.stream.get(number), gradient, call)
        return found.means()

    def _advance(self, index: int, prefix: Stream) -> None:
        """The second stream goes through the layer as it was quantized."""
        skeleton = prefix.skeleton
        with skeleton.filled(skeleton.layer_parameters(index)):
            for number in range(len(self.work.run.windows.ids)):
                hidden = skeleton.run(index, prefix.get(number), prefix.calls[index])
                check_finite(hidden, f"the output of the quantized layer {index}", number)
                prefix.states.put(number, hidden)

    def embedding(self) -> Iterator[Event]:
        """The embedding, if it is not the head as well."""
        name = self._target(self.skeleton.embedding_name)
        number = len(self.skeleton.layers) + 1
        if name is None or self._tied:
            return
        if self.store.has(number):
            self.store.load(number)
            return
        ways = yield from self._embedding_ways()
        hessian = prepare_hessian(ways.fit, EMBEDDING_DAMPING, self.work.options.column_order)
        fit, held_out = (np.asarray(part, np.float32) for part in (ways.fit, ways.held_out))
        known = MatrixStatistics(hessian, fit, held_out)
        yield from self._round(number, [name], lambda name, matrix: known)

    def head(self) -> Iterator[Event]:
        """The output head, whose input is the last layer's output through the final norm.

        Where it is also the embedding, a row is as often looked up as it is predicted, so its two
        losses add up.
        """
        name = self.skeleton.head_name
        count = len(self.skeleton.layers)
        with self._sums("the output head") as sums:
            with self.skeleton.filled(self.skeleton.outside_layers()):
                for number in range(len(self.work.run.windows.ids)):
                    sums.next_window(number)
                    rows = self.skeleton.finish(self.stream.get(number)).flatten(0, 1)
                    product = Product(name, 0, rows, (name, 0))
                    if self.prefix is None:
                        sums.observe(product)
                        continue
                    sums.remember(product)
                    rows = self.skeleton.finish(self.prefix.get(number)).flatten(0, 1)
                    sums.compare(Product(name, 0, rows, (name, 0)))
            if self._tied and self._target(name) is not None:
                ways = yield from self._embedding_ways()
                sums.add(ways.fit, ways.held_out)
            yield from self._round(count, sums.names, sums.of)
            yield from sums.notes
        self.checkpoint.commit(count + 1, self.stream.states.turn)

    @property
    def _tied(self) -> bool:
        return bool(self.skeleton.embedding_name == self.skeleton.head_name)

    def _measure(self) -> Iterator[Event]:
        """LayerGradients of all layers, once for the run."""
        if not self._measured:
            ids = self.work.run.windows.ids
            yield from measure_gradients(self.skeleton, ids, self.gradients)
            self._measured = True

    def _embedding_ways(self) -> Generator[Event, None, EmbeddingFisher]:
        """How much directions of the embedding matter, in units of its rows."""
        yield from self._measure()
        ways = self.gradients.embedding()
        scale = embedding_scale(self.skeleton, self.work.run.windows.ids[0]) ** 2
        return EmbeddingFisher(ways.fit * scale, ways.held_out * scale)

    def _target(self, parameter: str) -> str | None:
        """The tensor that holds a parameter, if it is to be rounded."""
        targets = self.skeleton.parameters.targets(parameter, 0)
        name = targets[0][0].name if targets else ""
        return name if name in self.work.codecs else None

    @contextmanager
    def _sums(self, place: str) -> Iterator[HessianAccumulator]:
        sums = HessianAccumulator(
            self.skeleton.parameters.targets, self.work.run.folder, place,
            self.work.options.damping, self.work.options.column_order,
        )  # fmt: skip
        try:
            yield sums
        finally:
            sums.close()

    def _round(
        self, layer: int, names: Sequence[str],
        known: Callable[[str, int], MatrixStatistics | None], trainer: Trainer | None = None,
    ) -> Iterator[Event]:  # fmt: skip
        packed: dict[str, Bytes] = {}
        outcomes: list[Outcome] = []
        for name in names:
            if name not in self.work.codecs:
                continue
            tensor = self.tensors[name]
            packed[name], outcome = round_tensor(
                name, self.work.rounder, self.work.codecs[name], _matrices(tensor),
                matrix_reader(self.work.run.model, tensor), partial(known, name),
                self.work.options, self.pool,
            )  # fmt: skip
            outcomes.append(outcome)
            yield outcome
        if trainer is not None:
            layer_now = self._tuned(layer, packed)
            yield from trainer.train(layer_now, self.work.options, outcomes)
        self.store.save(layer, packed, outcomes)

    def _format_of(self, name: str) -> str:
        return self.work.every_codec[name].name

    def _tuned(self, index: int, packed: dict[str, Bytes]) -> RoundedLayer:
        """The layer as it was rounded, with the inputs that it is to be fitted to."""
        stream = self.stream

        def read(name: str) -> Floats:
            tensor = self.tensors[name]
            matrix = matrix_reader(self.work.run.model, tensor)
            return np.concatenate([matrix(i) for i in range(_matrices(tensor))])

        return RoundedLayer(
            self.skeleton, index, stream.calls[index], self._format_of, read,
            packed, (self.prefix or stream).get, stream.get_next, len(self.work.run.windows.ids),
        )  # fmt: skip


def _matrices(tensor: OutputTensor) -> int:
    return tensor.shape[-3] if len(tensor.shape) > 2 else 1


def _shares_outputs(tensor: OutputTensor) -> bool:
    """Whether its matrices, if it has many, put out the same channels: the residual stream's."""
    return _matrices(tensor) == 1 or tensor.name.endswith("ffn_down_exps.weight")


def _with_outputs(
    known: Callable[[str, int], MatrixStatistics | None], outputs: Mapping[str, OutputFisher],
    name: str, matrix: int,
) -> MatrixStatistics | None:  # fmt: skip
    found = known(name, matrix)
    return None if found is None else replace(found, outputs=outputs.get(name))
