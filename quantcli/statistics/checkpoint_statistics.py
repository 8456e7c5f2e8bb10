"""The statistics that a calibration's walk left, one file a layer, for a statistics file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantcli.layerwise.checkpoint import Checkpoint
from quantcli.statistics.collector import InputTotals
from quantcli.statistics.input_statistics import HISTOGRAM, MEAN, MIN_MAX
from quantcli.statistics.layer_statistics import LayerStatistics
from quantcli.statistics.statistics_file import CACHE_KINDS, StatisticsChunk, cache_name
from quantcli.types import Declared

_VECTORS = {
    "abs_max": ("abs_max",), "mean_abs": ("mean_abs",), MEAN: ("mean",), MIN_MAX: ("min", "max"),
}  # fmt: skip
"""What is stored of each need, (matrices, columns)."""


@dataclass
class CheckpointStatistics:
    """What a run left in its checkpoint, one file a layer; ``needs`` picks from it."""

    checkpoint: Checkpoint
    layers: int
    needs: tuple[str, ...]

    def __post_init__(self) -> None:
        self.tensors: list[Declared] = []
        self.shares: dict[str, str] = {}
        vectors = [kind for need, kinds in _VECTORS.items() if need in self.needs for kind in kinds]
        for layer in range(self.layers):
            with self.checkpoint.read(layer) as stored:
                file = LayerStatistics(stored)
                for name, entry in file.entries().items():
                    self.tensors.append(Declared(f"{name}.counts", "I64", entry.counts.shape))
                    for kind in vectors:
                        self.tensors.append(Declared(f"{name}.{kind}", "F32", entry.squares.shape))
                    if HISTOGRAM in self.needs and entry.histogram is not None:
                        shape = entry.histogram.shape
                        self.tensors.append(Declared(f"{name}.{HISTOGRAM}", "F32", shape))
                cache = file.cache()
                if cache is not None:
                    name, heads = cache_name(layer), len(cache.keys)
                    self.tensors.append(Declared(f"{name}.counts", "I64", (1,)))
                    for kind in CACHE_KINDS:
                        self.tensors.append(Declared(f"{name}.{kind}", "F32", (1, heads)))
                for name in file.hessians:
                    shape = file.hessian_shape(name)
                    self.tensors.append(Declared(f"{name}.hessian", "F32", shape))
                self.shares |= file.hessian_of
        self.tensors.sort(key=lambda tensor: tensor.name)

    def parts(self) -> Iterator[StatisticsChunk]:
        """The values, layer by layer."""
        for layer in range(self.layers):
            with self.checkpoint.read(layer) as stored:
                file = LayerStatistics(stored)
                for name, entry in file.entries().items():
                    yield f"{name}.counts", 0, np.ascontiguousarray(entry.counts)
                    for kind, values in _vectors(entry, self.needs):
                        yield f"{name}.{kind}", 0, values.astype(np.float32)
                cache = file.cache()
                if cache is not None:
                    name = cache_name(layer)
                    yield f"{name}.counts", 0, np.ascontiguousarray(cache.tokens)
                    for kind, values in zip(CACHE_KINDS, (cache.keys, cache.values), strict=True):
                        yield f"{name}.{kind}", 0, values.astype(np.float32)
                for name in file.hessians:
                    offset = 0
                    for matrix in range(file.hessian_shape(name)[0]):
                        part = file.hessian(name, matrix)
                        yield f"{name}.hessian", offset, part
                        offset += part.nbytes


def _vectors(entry: InputTotals, needs: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    if "abs_max" in needs:
        yield "abs_max", entry.largest
    if "mean_abs" in needs:
        yield "mean_abs", entry.absolute / np.maximum(entry.counts, 1)[:, None]
    if MEAN in needs and entry.sums is not None:
        yield "mean", entry.sums / np.maximum(entry.counts, 1)[:, None]
    if MIN_MAX in needs:
        yield "min", entry.low
        yield "max", entry.high
    if HISTOGRAM in needs and entry.histogram is not None:
        yield HISTOGRAM, entry.histogram
