"""A survey of what types cost, divided over ranks: the matrices of each, and the sum of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantcli.ranks.group import Group
from quantcli.ranks.share import deal
from quantcli.run.ranked_rounding import Home
from quantcli.statistics.layer_hessians import HessianAccumulator
from quantcli.statistics.output_fisher import LayerFisher
from quantcli.types import OutputTensor


def share_matrices(
    group: Group, matrices: Sequence[tuple[str, int]], tensors: Mapping[str, OutputTensor],
    sums: HessianAccumulator, outputs: LayerFisher | None,
) -> list[tuple[str, int]]:  # fmt: skip
    """Those of the ``matrices``, by tensor and number, that this rank takes.

    What all ranks have seen of them is put together here. Matrices with one Hessian go together.
    """
    costs: dict[Home, float] = {}
    for name, matrix in matrices:
        tensor, home = tensors[name], sums.home(name, matrix)
        rows, columns = float(tensor.rows // tensor.matrices), float(tensor.columns)
        # The factors of both sides, and an encoding for each type.
        costs.setdefault(home, columns**3)
        costs[home] += rows**3 + rows * columns * columns
    owners = dict(zip(costs, deal(list(costs.values()), group.count), strict=True))
    takers = {key: [owners[sums.home(*key)]] for key in matrices}
    of_home = {home: [owner] for home, owner in owners.items()}
    sums.add_up(group, lambda home, matrix: of_home.get((home, matrix), []))
    if outputs is not None:
        outputs.add_up(group, lambda name, matrix: takers.get((name, matrix), []))
    return [key for key in matrices if takers[key] == [group.index]]


def add_costs(parts: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The costs by tensor and kind out of those that the ranks added, each its matrices."""
    total: dict[str, dict[str, float]] = {}
    for part in parts:
        for name, costs in part.items():
            into = total.setdefault(name, dict.fromkeys(costs, 0.0))
            for kind, cost in costs.items():
                into[kind] += cost
    return total
