"""A search in every fold group: by threads, and by the ranks that run a model together.

Each rank searches groups that cost about as much as another's, and all learn what was found, so
that all transform the model alike.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from quantcli.archs.fold import FoldGroup
from quantcli.ranks.joined import active_group
from quantcli.ranks.share import deal
from quantcli.types import OutputTensor, Progress

T = TypeVar("T")


def search_in_parts(
    groups: Sequence[FoldGroup], tensors: Mapping[str, OutputTensor],
    search: Callable[[FoldGroup], T], threads: int, label: str = "",
) -> Generator[Progress, None, list[T]]:  # fmt: skip
    """What ``search`` finds in each group, in their order; a ``label`` precedes their names."""
    ranks = active_group()
    owners = [0] * len(groups)
    if ranks is not None:
        owners = deal([_cost(group, tensors) for group in groups], ranks.count)
    index = 0 if ranks is None else ranks.index
    own = [number for number, owner in enumerate(owners) if owner == index]
    found: dict[int, T] = {}
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(search, [groups[number] for number in own])
        for done, (number, one) in enumerate(zip(own, results, strict=True), 1):
            found[number] = one
            yield Progress(done, len(own), label + groups[number].name, "groups")
    if ranks is not None:
        found = {number: one for theirs in ranks.gather(found) for number, one in theirs.items()}
    return [found[number] for number in range(len(groups))]


def _cost(group: FoldGroup, tensors: Mapping[str, OutputTensor]) -> float:
    """Products of some rows' errors with all columns, and the factors of what the columns see."""
    columns = max(tensors[name].columns for name in group.consumers)
    rows = sum(tensors[name].rows for name in group.consumers)
    return float(rows) * columns * columns + group.matrices * float(columns) ** 3
