"""The search over scales that AWQ and SmoothQuant share: candidates, losses, a clear winner.

Candidates are compared on a sample of each matrix's rows, the likeliest on a larger one: each is
rounded anew, so few rows do not resolve a few per cent. The best one is folded if, on all rows, it
lowers the loss by a margin, so no group is ever worse off than without the transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.fold import FoldGroup
from quantcli.formats.base import Floats
from quantcli.model import Model
from quantcli.transforms.base import GroupOutcome, TransformFound
from quantcli.transforms.channel_scales import scale_group, spread
from quantcli.transforms.divided_search import search_in_parts
from quantcli.transforms.output_error import ConsumerMatrix
from quantcli.transforms.spec import TransformSpec, merge_scales
from quantcli.types import Event

Scales = NDArray[np.float64]
Loss = Callable[[ConsumerMatrix, Floats, Scales], float]
"""The error of some rows of a consumer with scales on its columns."""

_SCREEN = 4
"""All candidates are compared on every so many of the sampled rows, a few on all of them."""
_LIKELY = 8


@dataclass(frozen=True)
class GroupPart:
    """A group's consumers, or those of one expert."""

    group: FoldGroup
    matrix: int
    consumers: Sequence[ConsumerMatrix]

    def columns(self, scales: Scales) -> Scales:
        """A scale for each of the consumers' columns, from one for each channel."""
        return np.asarray(spread(self.group, scales[None])[0], np.float64)


def choose(
    part: GroupPart, candidates: Mapping[str, Scales], loss: Loss, margin: float
) -> tuple[Scales, GroupOutcome]:
    """The best of ``candidates`` (or ones, when it does not win by ``margin``), and its story.

    Consumers' errors are added up as parts of their own outputs.
    """
    # Of q and k only the product counts, whose scale may lie in either; so for gate and up.
    total = sum(consumer.share for consumer in part.consumers)
    weights = [
        consumer.share / total / max(consumer.output(consumer.sample()), 1e-30)
        for consumer in part.consumers
    ]

    def rank(names: Sequence[str], step: int) -> list[str]:
        losses = dict.fromkeys(names, 0.0)
        for consumer, weight in zip(part.consumers, weights, strict=True):
            rows = consumer.sample()[::step]
            for name in names:
                losses[name] += weight * loss(consumer, rows, part.columns(candidates[name]))
        return sorted(losses, key=losses.__getitem__)

    best = rank(rank(list(candidates), _SCREEN)[:_LIKELY], 1)[0]
    ones, chosen = np.ones(part.group.channels), candidates[best]
    before = after = 0.0
    for consumer, weight in zip(part.consumers, weights, strict=True):
        for rows in consumer.slabs():
            before += weight * loss(consumer, rows, part.columns(ones))
            after += weight * loss(consumer, rows, part.columns(chosen))
    if not after < (1 - margin) * before:
        best, after, chosen = "", before, ones
    return chosen, GroupOutcome(part.group.name, part.matrix, before, after, best)


def search_groups(
    method: str,
    model: Model,
    groups: Sequence[FoldGroup],
    search: Callable[[FoldGroup, int], tuple[Scales, GroupOutcome] | None],
    settings: Mapping[str, Any],
    threads: int,
) -> Iterator[Event]:
    """Search every group and every expert's part, yielding progress, at last `TransformFound`.

    ``search`` gets a group and a matrix, and returns None where nothing is to be decided.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    parts, outcomes = [], []

    def search_all(group: FoldGroup) -> list[tuple[Scales, GroupOutcome] | None]:
        return [search(group, matrix) for matrix in range(group.matrices)]

    everything = yield from search_in_parts(groups, tensors, search_all, threads)
    for group, found in zip(groups, everything, strict=True):
        scales = np.ones((group.matrices, group.channels))
        searched = []
        for matrix, one in enumerate(found):
            if one is not None:
                scales[matrix] = one[0]
                searched.append(one[1])
        outcomes += searched
        if any(outcome.choice for outcome in searched):
            parts.append(scale_group(group, scales, tensors))
    transform = TransformSpec(method, merge_scales(parts), settings=settings)
    yield TransformFound(transform, tuple(outcomes))
