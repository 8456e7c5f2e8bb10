"""A calibrated quantization, layer by layer: run the layer, round its weights, go on.

All windows pass a layer with its original weights while the inputs of its weights are summed, one
Hessian for each distinct input; then each of its tensors is rounded and stored. One layer's
weights and Hessians are in memory (the sums in files), whatever the model's size, and a run that
was interrupted continues with the first layer that is not yet stored.

Several outputs of a model are rounded on one such run: a layer's Hessians serve the codecs of all,
and tensors that several hold in the same codec are rounded once.

With ``propagate`` a second stream of hidden states goes through the layers as they were quantized,
and each layer is fitted to give the original outputs from that stream's inputs; such an output has
a run of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from quantcli.errors import WeightError
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.native import UnencodableError
from quantcli.layerwise.checkpoint import Checkpoint
from quantcli.layerwise.hidden_states import HiddenStateCache
from quantcli.layerwise.walk import (
    LayerPass,
    LayerWalk,
    ObserveInput,
    Visitor,
    open_walk,
    run_silently,
)
from quantcli.rounding.options import Outcome
from quantcli.rounding.quantized_model import quantized_model
from quantcli.rounding.tensor import round_tensor
from quantcli.run.ranked_rounding import (
    Division,
    Unit,
    cut_units,
    divide_units,
    load_when_seen,
)
from quantcli.run.rounding_task import RoundedOutput, RoundingTask
from quantcli.run.tensor_parts import (
    matrix_reader,
    part_reader,
    unit_reader,
    unit_statistics,
    with_outputs,
)
from quantcli.statistics.algebra import find_algebra
from quantcli.statistics.layer_gradients import (
    EMBEDDING_DAMPING,
    EmbeddingFisher,
    LayerGradients,
    choose_windows,
    count_windows,
    embedding_fisher,
    measure_gradients,
    measure_output_fisher,
)
from quantcli.statistics.layer_hessians import HessianAccumulator, is_held_out
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.statistics.output_fisher import LayerFisher
from quantcli.training.base import RoundedLayer
from quantcli.training.end_to_end import Task, train_end_to_end
from quantcli.training.window_shares import TrainingRanks
from quantcli.types import Event, Note
from quantcli.workers import Workers, workers


def round_model(work: RoundingTask, checkpoint: Checkpoint) -> Iterator[Event]:
    """Round every tensor that a Hessian can be had for, into the store of each output.

    Yields notes, progress and an `Outcome` for each tensor. SourceError when a value is not finite.
    """
    run = work.run
    for output in work.outputs:
        for layer in range(checkpoint.done):
            output.store.load(layer)
        if output.store.held is not None:
            output.store.held.settle()
    # A layer that is tuned needs its windows' inputs after they went through it.
    memory = 0 if work.options.trainer else run.max_memory
    with ExitStack() as stack:
        pool = stack.enter_context(workers(run.threads))
        walk = stack.enter_context(
            open_walk(run, run.model, run.folder, checkpoint, max_memory=memory)
        )
        yield from walk.run(_RoundingVisitor(work, walk, checkpoint, pool, stack))
        for output in work.outputs if work.options.e2e else ():
            own = run if run.ranks else replace(run, folder=output.store.folder)
            task = Task(
                own, output.every_codec, output.store, walk.model, walk.states.get,
                codes=work.options.e2e_codes,
            )  # fmt: skip
            yield from train_end_to_end(task, work.options.e2e_steps)


@dataclass
class _RoundingVisitor(Visitor):
    """The visitor that rounds; ``stack`` closes the walk of the quantized ``prefix``."""

    work: RoundingTask
    walk: LayerWalk[HiddenStateCache]
    checkpoint: Checkpoint
    pool: Workers
    stack: ExitStack
    prefix: LayerWalk[HiddenStateCache] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.model = self.walk.model
        self.tensors = {tensor.name: tensor for tensor in self.work.run.model.tensors}
        windows = count_windows(self.work.options.fisher_windows, self.tensors)
        self.ranks = self.work.run.ranks
        if self.ranks is None:
            numbers, places = choose_windows(len(self.walk.ids), windows), None
        else:
            own, total = self.ranks.windows.numbers, self.ranks.windows.total
            chosen = choose_windows(total, windows)
            numbers = tuple(i for i, number in enumerate(own) if number in chosen)
            places = tuple(chosen.index(own[i]) for i in numbers)
        self.gradients = LayerGradients(self.work.gradients, numbers, places)
        self.algebra = find_algebra(self.work.run.device)
        self._measured = False

    def embedding(self) -> Iterator[Event]:
        """Round the embedding first, so that a quantized prefix begins with what it will hold."""
        yield from self._round_embedding()
        if self.work.options.propagate:
            run = self.work.run
            folder = run.folder / "quantized"
            folder.mkdir(exist_ok=True)
            (output,) = self.work.outputs
            model = quantized_model(run.model, output.every_codec, output.store)
            prefix = open_walk(
                run, model, folder, self.checkpoint, max_memory=run.max_memory, follows=True,
                label="the quantized layer",
            )  # fmt: skip
            self.prefix = self.stack.enter_context(prefix)
            self.prefix.embed()

    def layer(self, layer: LayerPass) -> Iterator[Event]:
        """All windows pass, the layer's tensors are rounded, the prefix passes what came of it."""
        prefix = self.prefix
        with self._accumulator(f"layer {layer.index}") as sums, ExitStack() as held:
            # Before the windows' hidden states give way to the next layer's.
            outputs = yield from self._output_fisher(layer)
            if outputs is not None:
                held.enter_context(outputs)
                sums.weights = outputs.weights
                if self.ranks is not None:
                    outputs.weights.add_up(self.ranks.group)

            def observe(number: int) -> ObserveInput:
                sums.watch(number, self._place(number))
                return sums.observe if prefix is None else sums.remember

            def compare(number: int) -> None:
                if prefix is not None:
                    layer.run(number, prefix.get(number), sums.compare)

            # With a prefix the original inputs of one window are kept to be compared.
            if prefix is None:
                yield from layer.forward(observe, together=lambda n: is_held_out(self._place(n)))
            else:
                yield from layer.forward(observe, compare)
            layer.release()
            statistics = partial(with_outputs, sums.of, outputs)
            trained = layer if self.work.trainer is not None else None
            if self.ranks is not None:
                sums.settle(self.ranks.group)
                yield from self._round_share(
                    layer.index, sums.names, statistics, sums, outputs, trained
                )
            else:
                yield from self._round(layer.index, sums.names, statistics, trained)
            yield from sums.notes
        if prefix is not None:
            run_silently(prefix.layer(layer.index))

    def head(self) -> Iterator[Event]:
        """The output head, whose input is the last layer's output through the final norm.

        Where it is also the embedding, a row is as often looked up as it is predicted, so its two
        losses add up.
        """
        count = len(self.model.layers)
        if self.checkpoint.done > count:
            return
        with self._accumulator("the output head") as sums:
            for number in self.walk.windows:
                sums.watch(number, self._place(number))
                given = self.model.head_input(self.walk.get(number))
                if self.prefix is None:
                    sums.observe(given)
                    continue
                sums.remember(given)
                sums.compare(self.model.head_input(self.prefix.get(number)))
            if self._tied and self._target(self.model.head_name) is not None:
                yield from self._measure()
                fisher = self._embedding_fisher()
                sums.add(fisher.fit, fisher.held_out)
            if self.ranks is not None:
                sums.settle(self.ranks.group)
                yield from self._round_share(count, sums.names, sums.of, sums)
            else:
                yield from self._round(count, sums.names, sums.of)
            yield from sums.notes
        self.checkpoint.commit(count + 1, self.walk.states.turn)

    def _round_embedding(self) -> Iterator[Event]:
        """If it is not the head as well."""
        name = self._target(self.model.embedding_name)
        number = len(self.model.layers) + 1
        if name is None or self._tied:
            return
        stores = [output.store for output in self.work.outputs]
        if all(store.has(number) for store in stores):
            for store in stores:
                store.load(number)
            return
        yield from self._measure()
        fisher = self._embedding_fisher()
        order = self.work.options.column_order
        hessian = self.algebra.prepare(fisher.fit, EMBEDDING_DAMPING, order)
        fit, held_out = (np.asarray(part, np.float32) for part in (fisher.fit, fisher.held_out))
        statistics = self.algebra.statistics(hessian, fit, held_out)
        if self.ranks is not None:
            yield from self._round_share(number, [name], lambda name, matrix: statistics)
        else:
            yield from self._round(number, [name], lambda name, matrix: statistics)

    def _embedding_fisher(self) -> EmbeddingFisher:
        group = None if self.ranks is None else self.ranks.group
        return embedding_fisher(self.model, self.work.run.windows.ids[0], self.gradients, group)

    def _place(self, window: int) -> int:
        """A window's number among those of all ranks."""
        return window if self.ranks is None else self.ranks.windows.numbers[window]

    def _output_fisher(self, layer: LayerPass) -> Generator[Event, None, LayerFisher | None]:
        """How much a filled layer's outputs matter to predictions, by tensor."""
        options = self.work.options
        if not ("fisher" in self.work.rounder.needs and options.fisher_windows):
            return None
        yield from self._measure()
        names = {
            name
            for output in self.work.outputs
            for name, codec in output.codecs.items()
            if codec.by_rows
        }
        tensors = [tensor for name, tensor in self.tensors.items() if name in names]
        gradients = self.gradients.of(layer.index, self.model)
        pairs = zip(self.gradients.numbers, gradients, strict=True)
        folder = self.work.run.folder
        return measure_output_fisher(layer, pairs, tensors, folder, self.algebra.fisher)

    def _measure(self) -> Iterator[Event]:
        """Gradients of all layers, once for the run."""
        if not self._measured:
            yield from measure_gradients(self.model, self.walk.ids, self.gradients)
            self._measured = True

    @property
    def _tied(self) -> bool:
        return bool(self.model.embedding_name == self.model.head_name)

    def _target(self, parameter: str) -> str | None:
        """The tensor that holds a parameter, if it is to be rounded."""
        name = self.model.tensor_of(parameter)
        return name if name is not None and self.work.codec_of(name) is not None else None

    def _accumulator(self, place: str) -> HessianAccumulator:
        targets = self.model.parameters.targets
        options = self.work.options
        return HessianAccumulator(
            targets, self.work.run.folder, place, options.damping, options.column_order,
            self.algebra,
        )  # fmt: skip

    def _find_takers(self, names: Sequence[str]) -> Generator[Event, None, dict[str, list[int]]]:
        """The outputs, by number, that round each tensor, if any does and none has it already."""
        outputs = self.work.outputs
        wanted = {}
        for name in names:
            takers = [index for index, output in enumerate(outputs) if name in output.codecs]
            if takers and name in outputs[takers[0]].store:
                yield Note(f"{name} serves several layers; the first one's inputs rounded it")
            elif takers:
                wanted[name] = takers
        return wanted

    def _round(
        self, layer: int, names: Sequence[str],
        statistics: Callable[[str, int], MatrixStatistics | None], trained: LayerPass | None = None,
    ) -> Iterator[Event]:  # fmt: skip
        outputs = self.work.outputs
        packed: list[dict[str, Bytes]] = [{} for _ in outputs]
        outcomes: list[list[Outcome]] = [[] for _ in outputs]
        wanted = yield from self._find_takers(names)
        for name, takers in wanted.items():
            found = self._round_tensor(name, takers, partial(statistics, name))
            for index, (rows, outcome) in found.items():
                packed[index][name] = rows
                outcomes[index].append(outcome)
                yield outcome
        for output, own, ends in zip(outputs, packed, outcomes, strict=True):
            if trained is not None and self.work.trainer is not None:
                rounded = self._rounded(trained, output, own)
                yield from self.work.trainer.train(rounded, self.work.options, ends)
            output.store.save(layer, own, ends)

    def _round_share(
        self, layer: int, names: Sequence[str],
        statistics: Callable[[str, int], MatrixStatistics | None],
        sums: HessianAccumulator | None = None, fisher: LayerFisher | None = None,
        trained: LayerPass | None = None,
    ) -> Iterator[Event]:  # fmt: skip
        """`_round` by several ranks, each its matrices; trained are they by all."""
        if self.ranks is None:
            raise ValueError("there are no ranks")
        group, outputs = self.ranks.group, self.work.outputs
        wanted = yield from self._find_takers(names)
        units: list[Unit] = []
        for name, indices in wanted.items():
            codecs = [outputs[i].codecs[name] for i in indices]
            by_strips = fisher is not None
            units += cut_units(
                self.tensors[name], codecs, by_strips=by_strips, ranks=group.count
            )  # fmt: skip
        homes = [None if sums is None else sums.home(u.tensor, u.matrix) for u in units]
        division = Division(group, units, homes, divide_units(units, homes, group.count))
        if sums is not None:
            sums.add_up(group, division.hessian_takers())
        if fisher is not None:
            fisher.add_up(group, division.fisher_takers())

        def round_unit(unit: Unit) -> dict[str, tuple[Bytes, Outcome]]:
            found = self._round_tensor(
                unit.tensor, wanted[unit.tensor], partial(statistics, unit.tensor), unit
            )
            return {str(index): made for index, made in found.items()}

        packed, outcomes = division.work(round_unit)
        for number, output in enumerate(outputs):
            key = str(number)
            ends = [outcomes[name, key] for name in wanted if (name, key) in outcomes]
            own = {name: packed[name, key] for name in wanted if (name, key) in packed}
            if trained is not None and self.work.trainer is not None:
                known = [name for name in wanted if (name, key) in outcomes]
                own = {name: group.give_all(own.get(name)) for name in known}
                rounded = self._rounded(trained, output, own)
                yield from self.work.trainer.train(rounded, self.work.options, ends)
            if group.index == 0:
                output.store.save(layer, own, ends)
            group.wait()
            if group.index != 0:
                load_when_seen(output.store, layer)
            yield from ends

    def _round_tensor(
        self, name: str, takers: Sequence[int],
        statistics: Callable[[int], MatrixStatistics | None], unit: Unit | None = None,
    ) -> dict[int, tuple[Bytes, Outcome]]:  # fmt: skip
        """The tensor, or a unit of it, rounded for each output among ``takers``.

        Once for those of one codec.
        """
        tensor = self.tensors[name]
        model, matrices = self.work.run.model, tensor.matrices
        read, parts = matrix_reader(model, tensor), part_reader(model, tensor)
        if unit is not None:
            matrices, read = 1, unit_reader(model, tensor, unit)
            parts = part_reader(model, tensor, unit)
            statistics = partial(unit_statistics, statistics, unit)
        codecs = {index: self.work.outputs[index].codecs[name] for index in takers}
        distinct = {codec.identity: codec for codec in codecs.values()}
        try:
            found = round_tensor(
                name, self.work.rounder, list(distinct.values()), matrices, read, statistics,
                self.work.options, self.pool, parts,
            )  # fmt: skip
        except UnencodableError as refused:
            # Its row counts from where one thread began, so it says nothing here.
            raise WeightError(
                f"{self.work.run.model.path}: tensor {name}: the weight {refused.value:g} "
                f"{refused.reason}",
                hint="leave this tensor in a wider type, or get the checkpoint again",
            ) from refused
        by_identity = dict(zip(distinct, found, strict=True))
        return {
            index: (rows, replace(outcome, format=codec.name))
            for index, codec in codecs.items()
            for rows, outcome in [by_identity[codec.identity]]
        }

    def _training_ranks(self) -> TrainingRanks | None:
        if self.ranks is None:
            return None
        return TrainingRanks(self.ranks.group, self.ranks.windows)

    def _rounded(
        self, trained: LayerPass, output: RoundedOutput, packed: dict[str, Bytes]
    ) -> RoundedLayer:
        """The layer as it was rounded, with the inputs that it is to be fitted to."""

        def read(name: str) -> Floats:
            tensor = self.tensors[name]
            return self.work.run.model.read_floats(tensor, 0, tensor.rows)

        return RoundedLayer(
            self.model, trained.index, trained.call, lambda name: output.every_codec[name].name,
            read, lambda name, rows: output.every_codec[name].decode(rows), packed,
            (self.prefix or self.walk).get, self.walk.get_next, len(self.walk.ids),
            self._training_ranks(),
        )  # fmt: skip
