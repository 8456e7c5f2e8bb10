"""AWQ: scale up the channels whose inputs are large, so that rounding costs them less.

For each fold group the scales are powers of the inputs' size, and the same divided by powers of the
weights' relative size ("duo"), a grid of exponents for each; the best by the output error on the
*grid that the weights will be written in* is folded into the group, if it beats no scaling by a
margin on all rows. So no group's loss rises, and the checkpoint stays a standard one.

The inputs' size is their root mean square, where the paper takes the mean absolute value: the
choice is among the same powers, and it is known after a rotation as well.

Before error feedback another loss decides (`transforms.output_error`), and inputs hardly matter in
it: feedback already puts errors where they forgive them. What is left to gain is little, that
columns of one size share a scale better, so powers of the inputs' pivots and of the columns' root
mean square are tried, each with its own exponents. Sources: AWQ (arXiv:2306.00978); the second form
is AutoAWQ's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.fold import FoldGroup
from quantcli.model import Model
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.transforms.base import GroupOutcome, TransformFound, TransformOptions
from quantcli.transforms.channel_scales import collect, model_groups
from quantcli.transforms.output_error import ConsumerMatrix, RoundRows, open_consumers
from quantcli.transforms.reorder import REORDER
from quantcli.transforms.scale_search import GroupPart, Scales, choose, search_groups
from quantcli.transforms.transformed_model import apply_transform
from quantcli.transforms.transformed_statistics import TransformedStatistics
from quantcli.types import Event

_EXPONENTS = tuple(step / 20 for step in range(1, 20))
_MARGIN, _MARGIN_BEFORE_FEEDBACK = 0.01, 0.02
_INPUTS, _COLUMNS = (0.0, 0.1, 0.2, 0.3), (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Exponents before feedback; larger ones of the inputs were never best where measured."""
_SMALLEST = 1e-4
"""Of a channel's inputs relative to the group's largest; smaller ones count as dead."""
_WINDOW = 32
"""Columns within which a weight's size is relative, about a block of most formats."""


class _Awq:
    """AWQ as a `Transform`."""

    name = "awq"
    options = ("weighted", "feedback", "groups", "margin", "threads")
    needs = ("hessian",)

    def check(self, model: Model, earlier: Sequence[str]) -> None:
        """It fits all models with fold groups."""

    def find(
        self, model: Model, grids: Mapping[str, RoundRows], statistics: InputStatistics,
        options: TransformOptions,
    ) -> Iterator[Event]:  # fmt: skip
        """Search every fold group's scales, yielding progress, at last `TransformFound`.

        A group's loss must fall by the margin: 1 % unless given, and 2 % before feedback, whose
        losses are a worse guide. Where columns share a scale, MLPs are reordered first.
        """
        if options.groups:
            for event in REORDER.find(model, grids, statistics, options):
                if isinstance(event, TransformFound):
                    model = apply_transform(model, event.transform)
                    statistics = TransformedStatistics(statistics, event.transform)
                yield event
        margin = options.margin
        if margin is None:
            margin = _MARGIN_BEFORE_FEEDBACK if options.feedback else _MARGIN
        groups = [g for g in model_groups(model) if any(name in grids for name in g.consumers)]

        def search(group: FoldGroup, matrix: int) -> tuple[Scales, GroupOutcome] | None:
            consumers = open_consumers(
                model, group, matrix, statistics, grids,
                weighted=options.weighted, feedback=options.feedback,
            )  # fmt: skip
            if not consumers:
                return None
            part = GroupPart(group, matrix, consumers)
            # Before experts, the router: it sees every token.
            squares = max(consumers, key=lambda consumer: consumer.share).squares
            inputs = np.sqrt(collect(group, squares[None], np.mean)[0])
            make = _candidates_before_feedback if options.feedback else _candidates
            candidates = dict(make(group, inputs, consumers))
            return choose(part, candidates, ConsumerMatrix.error, margin)

        settings = {"margin": margin, "weighted": options.weighted, "feedback": options.feedback}
        yield from search_groups("awq", model, groups, search, settings, options.threads)


AWQ = _Awq()


def _candidates(
    group: FoldGroup, inputs: NDArray[np.floating], consumers: list[ConsumerMatrix]
) -> Iterator[tuple[str, Scales]]:
    large = _beside_largest(inputs)
    weights = collect(group, _relative_size(consumers)[None], np.mean)[0]
    for exponent in _EXPONENTS:
        yield f"x^{exponent:g}", _even(large**exponent)
    for exponent in _EXPONENTS:
        both = large**exponent / (weights ** (1 - exponent) + 1e-4)
        yield f"x^{exponent:g}/w^{1 - exponent:g}", _even(both)


def _candidates_before_feedback(
    group: FoldGroup, inputs: NDArray[np.floating], consumers: list[ConsumerMatrix]
) -> Iterator[tuple[str, Scales]]:
    total: Scales = np.zeros(consumers[0].tensor.columns)
    for consumer in consumers:
        squares = np.square(consumer.sample()).mean(axis=0, dtype=np.float64)
        total += squares / max(float(squares.mean()), 1e-30)
    large = _beside_largest(inputs)
    weights = _beside_largest(np.sqrt(collect(group, total[None], np.mean)[0]))
    for one in _INPUTS:
        for other in _COLUMNS:
            if one or other:
                yield f"d^{one:g}/w^{other:g}", _even(large**one / weights**other)


def _beside_largest(values: NDArray[np.floating]) -> Scales:
    found = values.astype(np.float64)
    return np.asarray(np.maximum(found / max(float(found.max()), 1e-30), _SMALLEST))


def _even(scales: Scales) -> Scales:
    """The same ratios around one, so that neither producers nor consumers grow."""
    return np.asarray(scales / np.sqrt(scales.max() * scales.min()))


def _relative_size(consumers: list[ConsumerMatrix]) -> Scales:
    """Each column's mean |w| relative to the largest in its row's window of columns."""
    columns = consumers[0].tensor.columns
    total: Scales = np.zeros(columns)
    for consumer in consumers:
        size = np.abs(consumer.sample())
        window = _WINDOW if columns % _WINDOW == 0 else columns
        windows = size.reshape(len(size), -1, window)
        largest = np.maximum(windows.max(axis=2, keepdims=True), 1e-30)
        total += (windows / largest).mean(axis=0, dtype=np.float64).reshape(-1)
    return np.asarray(total / len(consumers))
