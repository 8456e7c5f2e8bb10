"""Statistics of a layer's inputs as a walk's checkpoint keeps them.

A layer's file holds ``NAME.counts`` (I64), ``NAME.squares``, ``NAME.largest``, ``NAME.absolute``,
``NAME.low`` and ``NAME.high`` (F64) of each tensor NAME, ``NAME.histogram`` and ``NAME.sums`` (F64)
where they were wanted, and ``NAME.hessian`` (F32) of those that hold one; of a layer that fills a
key-value cache ``cache.tokens`` (I64), ``cache.keys`` and ``cache.values`` (F64, the heads' largest
magnitudes).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.layerwise.cache_totals import CacheTotals
from quantcli.layerwise.checkpoint import Checkpoint, LayerFile
from quantcli.statistics.collector import Collector, InputTotals
from quantcli.statistics.input_statistics import HISTOGRAM

_FIELDS = {
    "counts": "I64", "squares": "F64", "largest": "F64", "absolute": "F64", "low": "F64",
    "high": "F64",
}  # fmt: skip
_CACHE = {"tokens": "I64", "keys": "F64", "values": "F64"}
_HESSIAN = "hessian"
_SUMS = "sums"
_SHARES = "shares"


def save_statistics(
    checkpoint: Checkpoint, layer: int, collector: Collector, cache: CacheTotals | None = None
) -> None:
    """Write what was collected of ``layer``, and of what it puts into a cache."""
    arrays: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, totals in collector.entries.items():
        for field, kind in _FIELDS.items():
            arrays[f"{name}.{field}"] = kind, getattr(totals, field)
        if totals.histogram is not None:
            arrays[f"{name}.{HISTOGRAM}"] = "F64", totals.histogram
        if totals.sums is not None:
            arrays[f"{name}.{_SUMS}"] = "F64", totals.sums
    for name, value in collector.hessians().items():
        arrays[f"{name}.{_HESSIAN}"] = "F32", value
    if cache is not None:
        for field, kind in _CACHE.items():
            arrays[f"cache.{field}"] = kind, getattr(cache, field)
    checkpoint.save(layer, arrays, {_SHARES: json.dumps(collector.hessian_of)})


class LayerStatistics:
    """A finished layer's statistics, read from its file."""

    def __init__(self, file: LayerFile) -> None:
        self._file = file
        self.hessian_of: dict[str, str] = json.loads(file.metadata[_SHARES])
        suffix = f".{_HESSIAN}"
        self.hessians = [n.removesuffix(suffix) for n in file.shapes if n.endswith(suffix)]

    def entries(self) -> dict[str, InputTotals]:
        """All sums but the Hessians."""
        suffix = ".counts"
        names = [n.removesuffix(suffix) for n in self._file.shapes if n.endswith(suffix)]
        return {name: self._entry(name) for name in names}

    def _entry(self, name: str) -> InputTotals:
        found = InputTotals(*(self._file.read(f"{name}.{field}") for field in _FIELDS))
        if f"{name}.{HISTOGRAM}" in self._file.shapes:
            found.histogram = self._file.read(f"{name}.{HISTOGRAM}")
        if f"{name}.{_SUMS}" in self._file.shapes:
            found.sums = self._file.read(f"{name}.{_SUMS}")
        return found

    def cache(self) -> CacheTotals | None:
        """What the layer put into a key-value cache; None where it did not, or was not watched."""
        if "cache.tokens" not in self._file.shapes:
            return None
        return CacheTotals(*(self._file.read(f"cache.{field}") for field in _CACHE))

    def hessian(self, name: str, matrix: int) -> NDArray[np.float32]:
        """Matrix ``matrix`` of a Hessian, shape (columns, columns), float32."""
        return self._file.read_part(f"{name}.{_HESSIAN}", matrix)

    def hessian_shape(self, name: str) -> tuple[int, ...]:
        """(matrices, columns, columns)."""
        return self._file.shapes[f"{name}.{_HESSIAN}"]
