"""The search over scales that AWQ and SmoothQuant share: candidates, losses, a clear winner.

Candidates are compared on a sample of each matrix's rows. The best one is folded if, on all rows,
it lowers the loss by a margin, so no group is ever worse off than without the transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.fold import FoldGroup
from quantcli.methods.folding import scale_group, spread
from quantcli.methods.loss import Reader
from quantcli.methods.transform import Floats, Transform, merge_scales
from quantcli.model import Model
from quantcli.types import Event, Progress

Scales = NDArray[np.float64]
Loss = Callable[[Reader, Floats, Scales], float]
"""The error of some rows of a reader with scales on its columns."""

SAMPLE = 512
"""Rows of a matrix that candidates are compared on."""


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search did to one group, or to one expert's part of it.

    Losses are relative to the square of what the group's readers put out. ``choice`` names the
    scales that were folded, or is empty where none were clearly better.
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
    """A group's readers, or those of one expert, with the rows that candidates are compared on."""

    group: FoldGroup
    matrix: int
    readers: Sequence[Reader]

    def samples(self) -> list[Floats]:
        """The sampled rows of each reader."""
        return [np.concatenate(list(reader.slabs(SAMPLE))) for reader in self.readers]

    def columns(self, scales: Scales) -> Scales:
        """A scale for each of the readers' columns, from one for each channel."""
        return np.asarray(spread(self.group, scales[None])[0], np.float64)


def choose(
    part: Part, samples: list[Floats], candidates: Mapping[str, Scales], loss: Loss, margin: float
) -> tuple[Scales, Searched]:
    """The best of ``candidates`` (or ones, when it does not win by ``margin``), and its story."""
    best, least = "", np.inf
    for name, scales in candidates.items():
        columns = part.columns(scales)
        total = 0.0
        for reader, rows in zip(part.readers, samples, strict=True):
            total += loss(reader, rows, columns)
        if total < least:
            best, least = name, total
    ones = np.ones(part.group.channels)
    chosen = candidates[best] if best else ones
    before = after = energy = 0.0
    for reader in part.readers:
        for rows in reader.slabs():
            before += loss(reader, rows, part.columns(ones))
            after += loss(reader, rows, part.columns(chosen))
            energy += reader.energy(rows)
    if not after < (1 - margin) * before:
        best, after, chosen = "", before, ones
    whole = energy if energy > 0 else 1.0
    return chosen, Searched(part.group.name, part.matrix, before / whole, after / whole, best)


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
            yield Progress(number + 1, len(groups), group.name)
    transform = Transform(method, merge_scales(parts), settings=settings)
    yield Transformed(transform, tuple(outcomes))
