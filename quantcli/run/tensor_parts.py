"""A tensor's matrices, or the unit of it that one rank rounds: their rows and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from quantcli.formats.base import Floats
from quantcli.model import Model
from quantcli.run.ranked_rounding import Unit, statistics_of
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.statistics.output_fisher import LayerFisher
from quantcli.types import OutputTensor

_PART = 1 << 24
"""Weights that are rounded at once where rows know nothing of one another."""


def matrix_reader(model: Model, tensor: OutputTensor) -> Callable[[int], Floats]:
    """What reads matrix i of a tensor, a stack of them or the one, as float32."""
    height = tensor.shape[-2]
    return lambda matrix: model.read_floats(tensor, matrix * height, (matrix + 1) * height)


def part_reader(
    model: Model, tensor: OutputTensor, unit: Unit | None = None
) -> Callable[[int], Iterator[Floats]]:
    """The same, or of a ``unit`` alone, some rows at a time."""
    height, step = tensor.shape[-2], max(1, _PART // tensor.shape[-1])

    def read(matrix: int) -> Iterator[Floats]:
        first, last = matrix * height, (matrix + 1) * height
        if unit is not None:
            first, last = unit.matrix * height + unit.start, unit.matrix * height + unit.stop
        for start in range(first, last, step):
            yield model.read_floats(tensor, start, min(start + step, last))

    return read


def unit_reader(model: Model, tensor: OutputTensor, unit: Unit) -> Callable[[int], Floats]:
    """What reads a unit's rows, as float32."""
    base = unit.matrix * tensor.shape[-2]
    return lambda _: model.read_floats(tensor, base + unit.start, base + unit.stop)


def unit_statistics(
    statistics: Callable[[int], MatrixStatistics | None], unit: Unit, _: int
) -> MatrixStatistics | None:
    """Statistics of a unit's rows, from those of its tensor's matrices."""
    return statistics_of(unit, statistics(unit.matrix))


def with_outputs(
    statistics: Callable[[str, int], MatrixStatistics | None], outputs: LayerFisher | None,
    name: str, matrix: int,
) -> MatrixStatistics | None:  # fmt: skip
    """A matrix' statistics with how much its outputs matter, where that is known."""
    found = statistics(name, matrix)
    if found is None or outputs is None:
        return found
    return replace(found, outputs=outputs.of(name, matrix))
