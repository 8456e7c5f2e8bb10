"""Statistics of a layer's inputs as a walk's checkpoint keeps them.

A layer's file holds ``NAME.counts`` (I64), ``NAME.squares``, ``NAME.largest`` and
``NAME.absolute`` (F64) of each tensor NAME, and ``NAME.hessian`` (F32) of those that hold one.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.layerwise.checkpoint import Checkpoint, LayerFile
from quantcli.statistics.collector import Collector, InputTotals

_FIELDS = {"counts": "I64", "squares": "F64", "largest": "F64", "absolute": "F64"}
_HESSIAN = "hessian"
_SHARES = "shares"


def save_statistics(checkpoint: Checkpoint, layer: int, collector: Collector) -> None:
    """Write what was collected of ``layer``."""
    arrays: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, totals in collector.entries.items():
        for field, kind in _FIELDS.items():
            arrays[f"{name}.{field}"] = kind, getattr(totals, field)
    for name, value in collector.hessians().items():
        arrays[f"{name}.{_HESSIAN}"] = "F32", value
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
        return {
            name: InputTotals(*(self._file.read(f"{name}.{field}") for field in _FIELDS))
            for name in names
        }

    def hessian(self, name: str, matrix: int) -> NDArray[np.float32]:
        """Matrix ``matrix`` of a Hessian, shape (columns, columns), float32."""
        return self._file.read_part(f"{name}.{_HESSIAN}", matrix)

    def hessian_shape(self, name: str) -> tuple[int, ...]:
        """(matrices, columns, columns)."""
        return self._file.shapes[f"{name}.{_HESSIAN}"]
