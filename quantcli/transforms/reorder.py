"""Put an MLP's channels in the order of their weights' size, so that alike ones share a scale.

The channels between an MLP's first matrices and its last may come in any order: rows of gate and
up change places, columns of down follow them, and the model's function stays what it was. Where a
grid has one scale for each group of columns, the groups then hold columns of one size. The order is
taken where it lowers the loss that the search for scales has. Channels inside experts stay where
they are.

Reordering channels for quantization groups: RPTQ (arXiv:2304.01089), which does it for activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.fold import FoldGroup
from quantcli.formats.base import Floats
from quantcli.model import Model
from quantcli.statistics.hessian import prepare_hessian
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.transforms.base import TransformFound, TransformOptions
from quantcli.transforms.channel_scales import model_groups
from quantcli.transforms.divided_search import search_in_parts
from quantcli.transforms.orthogonal import Permutation
from quantcli.transforms.output_error import ConsumerMatrix, RoundRows, open_consumers
from quantcli.transforms.spec import Operation, RotationRef, TransformSpec
from quantcli.types import Event, Note, OutputTensor


class _Reorder:
    """Reordering as a `Transform`."""

    name = "reorder"
    options = ("weighted", "feedback", "threads")
    needs = ("hessian",)

    def check(self, model: Model, earlier: Sequence[str]) -> None:
        """It fits all models with fold groups."""

    def find(
        self, model: Model, grids: Mapping[str, RoundRows], statistics: InputStatistics,
        options: TransformOptions,
    ) -> Iterator[Event]:  # fmt: skip
        """Find every MLP's order, yielding progress and a note, at last `TransformFound`."""
        tensors = {tensor.name: tensor for tensor in model.tensors}
        groups = [
            group
            for group in model_groups(model)
            if turn_channels(group, tensors) and group.consumers[0] in grids
        ]

        def search(group: FoldGroup) -> _Order | None:
            consumers = open_consumers(
                model,
                group,
                0,
                statistics,
                grids,
                weighted=options.weighted,
                feedback=options.feedback,
            )
            return _search(consumers[0]) if consumers else None

        operations: dict[str, Operation] = {}
        orders: dict[str, Permutation] = {}
        before = after = 0.0
        found = yield from search_in_parts(groups, tensors, search, options.threads, "order of ")
        for group, one in zip(groups, found, strict=True):
            if one is not None:
                before += one.before
                after += min(one.before, one.after)
            if one is not None and one.after < one.before:
                orders[group.name] = Permutation(one.order)
                operations |= turn_channels(group, tensors)
        if groups:
            ratio = after / before if before > 0 else 1.0
            yield Note(
                f"the channels of {len(orders)} of {len(groups)} MLPs are put in the order of "
                f"their size; the error that they lead to is {ratio:.2f} times what it was"
            )
        settings = {"weighted": options.weighted, "feedback": options.feedback}
        yield TransformFound(TransformSpec("reorder", operations, orders, settings))


REORDER = _Reorder()


@dataclass(frozen=True)
class _Order:
    """An order of channels, and the losses of the consumer without and with it."""

    order: NDArray[np.int64]
    before: float
    after: float


def _search(consumer: ConsumerMatrix) -> _Order:
    rows = consumer.sample()
    order = np.argsort(-np.square(rows).sum(axis=0, dtype=np.float64), kind="stable")
    hessian = np.ascontiguousarray(consumer.hessian[np.ix_(order, order)])
    turned = replace(consumer, load=_always(hessian))
    if consumer.pivots is not None:
        turned = replace(turned, pivots=_always(prepare_hessian(hessian).pivots))
    ones = np.ones(len(order))
    share = 1 / max(consumer.output(rows), 1e-30)
    before = after = 0.0
    for slab in consumer.slabs():
        before += share * consumer.error(slab, ones)
        after += share * turned.error(np.ascontiguousarray(slab[:, order]), ones)
    return _Order(order, before, after)


def _always(values: Floats) -> Callable[[str, int], Floats]:
    return lambda name, matrix: values


def turn_channels(group: FoldGroup, tensors: Mapping[str, OutputTensor]) -> dict[str, Operation]:
    """Turns, with the group's name, of the tensors that make or read an MLP's channels.

    Empty where the channels must stay in their places.
    """
    if group.kind != "gated" or group.matrices > 1:
        return {}
    channels = RotationRef(group.name, 0, group.channels)
    turns = {}
    for producer in group.producers:
        # Where gate lies above up in one matrix, the turn goes on from one to the other.
        fused = producer.first == group.channels
        turns[producer.tensor] = RotationRef(
            group.name, 0 if fused else producer.first, producer.last
        )
        if fused:
            continue
        gate = group.name.replace("ffn_up", "ffn_gate")
        if gate == group.name or f"{gate}.weight" not in tensors:
            return {}
        turns |= {f"{gate}.{kind}": channels for kind in ("weight", "bias")}
    found = {name: Operation(columns_rotation=channels) for name in group.consumers}
    for name, turn in turns.items():
        if name in tensors:
            vector = len(tensors[name].shape) == 1
            found[name] = (
                Operation(columns_rotation=turn) if vector else Operation(rows_rotation=turn)
            )
    return found
