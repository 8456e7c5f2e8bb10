"""A layer's matrices divided over ranks: each is rounded by one, which alone gets its sums.

A matrix is cut where its rows know nothing of one another: into the strips of its outputs' Fisher
information, or where there is none, anywhere. Who takes what follows from the shapes alone, so that
a run with as many ranks gives the same bytes. The packed rows go to rank 0, which stores the layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantcli.errors import OutputError
from quantcli.formats.base import Bytes
from quantcli.ranks.group import Group
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.options import Outcome
from quantcli.rounding.run_store import EncodedStore
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.statistics.output_fisher import cut_strips
from quantcli.types import OutputTensor

Home = tuple[str, int]
"""A Hessian: the tensor under whose name it is held, and the matrix."""

_SMALL = 256
"""Rows that are not cut further."""
_CODE = 2300
"""Columns whose products with an error cost as much as choosing one weight's code does."""
_ROW = 4
"""Rows whose products with an error cost as much as those of one column: they come in blocks."""
_FACTOR = 30
"""Products of a factorisation that cost as much as one of a few rows with an error."""
_APPEAR = 90.0
"""Seconds after which a file that another machine wrote must be seen here."""


@dataclass(frozen=True)
class Unit:
    """Rows ``start:stop`` of a matrix of a tensor, number ``strip`` of its strips if of one."""

    tensor: str
    matrix: int
    start: int
    stop: int
    columns: int
    strip: int | None = None

    @property
    def cost(self) -> float:
        """What rounding it takes, in products of an error with a column, as it was measured."""
        rows = self.stop - self.start
        return float(rows) * self.columns * (self.columns + rows / _ROW + _CODE)


def cut_units(
    tensor: OutputTensor, codecs: Sequence[WeightCodec], *, by_strips: bool, ranks: int
) -> list[Unit]:
    """What ranks take apart of a tensor that becomes ``codecs``."""
    matrices = tensor.matrices
    rows, columns = tensor.shape[-2], tensor.columns
    whole = [slice(0, rows)]
    strips = whole
    if all(codec.by_rows for codec in codecs) and matrices == 1:
        if by_strips:
            strips = cut_strips(rows)
        else:
            count = max(1, min(ranks, rows // _SMALL))
            strips = [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    return [
        Unit(
            tensor.name, matrix, part.start, part.stop, columns,
            number if by_strips and len(strips) > 1 else None,
        )
        for matrix in range(matrices)
        for number, part in enumerate(strips)
    ]  # fmt: skip


def divide_units(units: Sequence[Unit], homes: Sequence[Home | None], ranks: int) -> list[int]:
    """The rank that takes each unit: the most expensive first, each to whom it finishes earliest.

    The first unit of a Hessian on a rank costs its factors as well.
    """
    loads, known = [0.0] * ranks, [set[Home]() for _ in range(ranks)]
    owners = [0] * len(units)
    for index in sorted(range(len(units)), key=lambda i: (-units[i].cost, i)):
        unit, home = units[index], homes[index]
        ends = []
        for load, own in zip(loads, known, strict=True):
            factors = 0.0 if home is None or home in own else float(unit.columns) ** 3 / _FACTOR
            ends.append(load + factors + unit.cost)
        owner = ends.index(min(ends))
        loads[owner] = ends[owner]
        if home is not None:
            known[owner].add(home)
        owners[index] = owner
    return owners


def takers(keys: Sequence[Any], owners: Sequence[int]) -> dict[Any, list[int]]:
    """The ranks, in order, that have a unit with each of the ``keys``, which are by units."""
    found: dict[Any, set[int]] = {}
    for key, owner in zip(keys, owners, strict=True):
        found.setdefault(key, set()).add(owner)
    return {key: sorted(ranks) for key, ranks in found.items()}


def statistics_of(unit: Unit, found: MatrixStatistics | None) -> MatrixStatistics | None:
    """A unit's part of its matrix's statistics."""
    if found is None or found.outputs is None or unit.strip is None:
        return found
    mean = found.outputs.means[unit.strip]
    outputs = replace(found.outputs, rows=unit.stop - unit.start, means=(mean,))
    return replace(found, outputs=outputs)


def join_outcomes(parts: Sequence[tuple[Unit, Outcome]]) -> Outcome:
    """A tensor's outcome out of its units': of the rows of a matrix each counts alike."""
    first = parts[0][1]
    rows = sum(unit.stop - unit.start for unit, _ in parts)
    before, after = (
        sum((u.stop - u.start) * getattr(outcome, name) for u, outcome in parts) / rows
        for name in ("before", "after")
    )
    matrices = {unit.matrix for unit, _ in parts}
    changed = {unit.matrix for unit, outcome in parts if not outcome.kept}
    return replace(
        first, before=before, after=after, matrices=len(matrices),
        kept=len(matrices - changed),
    )  # fmt: skip


@dataclass(frozen=True)
class Division:
    """The units of some tensors, and the rank of each."""

    group: Group
    units: Sequence[Unit]
    homes: Sequence[Home | None]
    owners: Sequence[int]

    def hessian_takers(self) -> Callable[[str, int], Sequence[int]]:
        """Which ranks need a Hessian."""
        found = takers(self.homes, self.owners)
        return lambda home, matrix: found.get((home, matrix), [])

    def fisher_takers(self) -> Callable[[str, int], Sequence[int]]:
        """Which ranks need the outputs' Fisher information of a matrix."""
        keys = [(unit.tensor, unit.matrix) for unit in self.units]
        found = takers(keys, self.owners)
        return lambda name, matrix: found.get((name, matrix), [])

    def work(
        self, round_unit: Callable[[Unit], Mapping[str, tuple[Bytes, Outcome]]]
    ) -> tuple[dict[tuple[str, str], Bytes], dict[tuple[str, str], Outcome]]:
        """Round the units of this rank; the packed tensors (on rank 0) and all outcomes.

        Both by tensor and by the identity of a codec, as ``round_unit`` has them.
        """
        order = sorted(range(len(self.units)), key=lambda i: (str(self.homes[i]), i))
        made = {i: round_unit(self.units[i]) for i in order if self.owners[i] == self.group.index}
        told: dict[int, dict[str, Outcome]] = {}
        for theirs in self.group.gather(
            {i: {key: outcome for key, (_, outcome) in found.items()} for i, found in made.items()}
        ):
            told |= theirs
        packed: dict[tuple[str, str], list[Bytes]] = {}
        outcomes: dict[tuple[str, str], list[tuple[Unit, Outcome]]] = {}
        for index, unit in enumerate(self.units):
            for key, outcome in told[index].items():
                rows = made[index][key][0] if index in made else None
                rows = self.group.hand_over(rows, self.owners[index])
                if rows is not None:
                    packed.setdefault((unit.tensor, key), []).append(rows)
                outcomes.setdefault((unit.tensor, key), []).append((unit, outcome))
        return (
            {key: np.concatenate(parts) for key, parts in packed.items()},
            {key: join_outcomes(parts) for key, parts in outcomes.items()},
        )


def load_when_seen(store: EncodedStore, layer: int) -> None:
    """Open a layer that rank 0 has stored; OutputError where its folder is not shared.

    A network's filesystem may take a while to notice a new file.
    """
    began = time.monotonic()
    while not store.has(layer):
        if time.monotonic() - began > _APPEAR:
            raise OutputError(
                f"{store.folder} does not show the layer that rank 0 has stored there",
                hint="-o in a folder that all machines share",
            )
        time.sleep(0.05)
    store.load(layer)
