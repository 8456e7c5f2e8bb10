"""AWQ: scale up the channels whose inputs are large, so that rounding costs them less.

For each fold group the scales are powers of the inputs' size, and the same divided by powers of
the weights' relative size ("duo"), a grid of exponents for each; the best by the output error on
the *grid that the weights will be written in* is folded into the group, if it beats no scaling
by a margin on all rows. So no group's loss rises, and the checkpoint stays a standard one.

The inputs' size is their root mean square, where the paper takes the mean absolute value: the
choice is among the same powers, and it is known after a rotation as well.

Before error feedback another loss decides (`transforms.output_error`), and inputs hardly matter in
it: feedback already puts errors where they forgive them. What is left to gain is little, that
columns of one size share a scale better, so powers of the inputs' pivots and of the columns' root
mean square are tried, each with exponents of its own.
Sources: AWQ (arXiv:2306.00978); the second form is AutoAWQ's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.fold import FoldGroup
from quantcli.model import Model
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.transforms.channel_scales import collect, model_groups
from quantcli.transforms.output_error import ConsumerMatrix, RoundRows, open_consumers
from quantcli.transforms.scale_search import GroupOutcome, GroupPart, Scales, choose, search_groups
from quantcli.types import Event

_EXPONENTS = tuple(step / 20 for step in range(1, 20))
_MARGIN, _MARGIN_BEFORE_FEEDBACK = 0.01, 0.02
_INPUTS, _COLUMNS = (0.0, 0.1, 0.2, 0.3), (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Exponents before feedback; larger ones of the inputs were never best where measured."""
_SMALLEST = 1e-4
"""Of a channel's inputs beside the group's largest; what is smaller is as good as dead."""
_WINDOW = 32
"""Columns within which a weight's size is relative, about a block of most formats."""


def awq(
    model: Model,
    grids: Mapping[str, RoundRows],
    measured: InputStatistics,
    *,
    weighted: bool = True,
    feedback: bool = False,
    margin: float | None = None,
    threads: int = 1,
) -> Iterator[Event]:
    """Search every fold group's scales, yielding progress, at last `TransformFound`.

    ``grids`` holds the tensors that will be rounded; ``weighted`` says whether their rounding
    knows the columns' importance, ``feedback`` whether it feeds errors back; ``margin`` is the
    part by which the loss must fall: 1 % unless given, and 2 % before feedback, whose losses are a
    worse guide.
    ``measured`` needs hessian.
    """
    least = margin
    if least is None:
        least = _MARGIN_BEFORE_FEEDBACK if feedback else _MARGIN
    groups = [group for group in model_groups(model) if any(n in grids for n in group.consumers)]

    def search(group: FoldGroup, matrix: int) -> tuple[Scales, GroupOutcome] | None:
        consumers = open_consumers(
            model, group, matrix, measured, grids, weighted=weighted, feedback=feedback
        )
        if not consumers:
            return None
        part = GroupPart(group, matrix, consumers)
        # Before experts, the router: it sees every token.
        squares = max(consumers, key=lambda consumer: consumer.share).squares
        inputs = np.sqrt(collect(group, squares[None], np.mean)[0])
        make = _candidates_before_feedback if feedback else _candidates
        candidates = dict(make(group, inputs, consumers))
        return choose(part, candidates, ConsumerMatrix.error, least)

    settings = {"margin": least, "weighted": weighted, "feedback": feedback}
    return search_groups("awq", model, groups, search, settings, threads)


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
    """Each column's mean |w| beside the largest in its row's window of columns."""
    columns = consumers[0].tensor.columns
    total: Scales = np.zeros(columns)
    for consumer in consumers:
        size = np.abs(consumer.sample())
        window = _WINDOW if columns % _WINDOW == 0 else columns
        windows = size.reshape(len(size), -1, window)
        largest = np.maximum(windows.max(axis=2, keepdims=True), 1e-30)
        total += (windows / largest).mean(axis=0, dtype=np.float64).reshape(-1)
    return np.asarray(total / len(consumers))
