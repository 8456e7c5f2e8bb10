"""The search over scales that AWQ and SmoothQuant share: candidates, losses, a clear winner.

Candidates are compared on a sample of each matrix's rows, the likeliest on a larger one: each is
rounded anew, so few rows tell little of a few per cent. The best one is folded if, on all rows, it
lowers the loss by a margin, so no group is ever worse off than without the transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.fold import FoldGroup
from quantcli.model import Model
from quantcli.transforms.channel_scales import scale_group, spread
from quantcli.transforms.output_error import Reader
from quantcli.transforms.spec import Floats, Transform, merge_scales
from quantcli.types import Event, Progress

Scales = NDArray[np.float64]
Loss = Callable[[Reader, Floats, Scales], float]
"""The error of some rows of a reader with scales on its columns."""

_SCREEN = 4
"""All candidates are compared on every so many of the sampled rows, a few on all of them."""
_LIKELY = 8


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search did to one group, or to one expert's part of it.

    Losses are squared errors of the readers' outputs as parts of these outputs' squares, on the
    mean over the readers. ``choice`` names the scales that were folded, or is empty where none
    were clearly better.
    """

    group: str
    matrix: int
    before: float
    after: float
    choice: str


@dataclass(frozen=True, slots=True)
class Transformed(Event):
    """A transform is found; ``outcomes`` tell of each group that was searched."""

    transform: Transform
    outcomes: tuple[Searched, ...] = ()


@dataclass(frozen=True)
class Part:
    """A group's readers, or those of one expert."""

    group: FoldGroup
    matrix: int
    readers: Sequence[Reader]

    def columns(self, scales: Scales) -> Scales:
        """A scale for each of the readers' columns, from one for each channel."""
        return np.asarray(spread(self.group, scales[None])[0], np.float64)


def choose(
    part: Part, candidates: Mapping[str, Scales], loss: Loss, margin: float
) -> tuple[Scales, Searched]:
    """The best of ``candidates`` (or ones, when it does not win by ``margin``), and its story.

    Readers' errors are added up as parts of their own outputs.
    """
    # Of q and k only the product counts, whose scale may lie in either; so for gate and up.
    total = sum(reader.share for reader in part.readers)
    weights = [
        reader.share / total / max(reader.output(reader.sample()), 1e-30) for reader in part.readers
    ]

    def rank(names: Sequence[str], step: int) -> list[str]:
        losses = dict.fromkeys(names, 0.0)
        for reader, weight in zip(part.readers, weights, strict=True):
            rows = reader.sample()[::step]
            for name in names:
                losses[name] += weight * loss(reader, rows, part.columns(candidates[name]))
        return sorted(losses, key=losses.__getitem__)

    best = rank(rank(list(candidates), _SCREEN)[:_LIKELY], 1)[0]
    ones, chosen = np.ones(part.group.channels), candidates[best]
    before = after = 0.0
    for reader, weight in zip(part.readers, weights, strict=True):
        for rows in reader.slabs():
            before += weight * loss(reader, rows, part.columns(ones))
            after += weight * loss(reader, rows, part.columns(chosen))
    if not after < (1 - margin) * before:
        best, after, chosen = "", before, ones
    return chosen, Searched(part.group.name, part.matrix, before, after, best)


def search_groups(
    method: str,
    model: Model,
    groups: Sequence[FoldGroup],
    search: Callable[[FoldGroup, int], tuple[Scales, Searched] | None],
    settings: Mapping[str, Any],
    threads: int,
) -> Iterator[Event]:
    """Search every group and every expert's part, yielding progress, at last `Transformed`.

    ``search`` gets a group and a matrix, and returns None where nothing is to be decided.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    parts, outcomes = [], []

    def search_all(group: FoldGroup) -> list[tuple[Scales, Searched] | None]:
        return [search(group, matrix) for matrix in range(group.matrices)]

    with ThreadPoolExecutor(threads, thread_name_prefix=method) as pool:
        for number, found in enumerate(pool.map(search_all, groups)):
            group = groups[number]
            scales = np.ones((group.matrices, group.channels))
            told = []
            for matrix, one in enumerate(found):
                if one is not None:
                    scales[matrix] = one[0]
                    told.append(one[1])
            outcomes += told
            if any(outcome.choice for outcome in told):
                parts.append(scale_group(group, scales, tensors))
            yield Progress(number + 1, len(groups), group.name, "groups")
    transform = Transform(method, merge_scales(parts), settings=settings)
    yield Transformed(transform, tuple(outcomes))
