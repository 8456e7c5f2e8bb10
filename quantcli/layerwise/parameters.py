"""transformers' parameters out of any opened model: the architecture's table read backwards.

The table maps stored tensors to GGUF's; asked about the layout that transformers holds in memory
(which may fuse what a checkpoint keeps apart), it says which rows of which GGUF tensor make each
parameter. So a checkpoint in either layout and a GGUF of any type are one case, and a GGUF gives
the weights that llama.cpp would see, decoded by our kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import find_architecture
from quantcli.archs.rules import Feed
from quantcli.checkpoint_view import Use, find_uses, read_back
from quantcli.errors import ArchitectureError, WeightError
from quantcli.formats import FORMATS, get_format, native
from quantcli.model import Model
from quantcli.types import OutputTensor, TensorInfo, row_count

_WIDTHS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class OutputRows:
    """Rows of matrix ``matrix`` of a tensor, from ``first`` on, by the numbers of the outputs of
    the product behind each: int64 ``numbers`` (rows,)."""

    tensor: OutputTensor
    matrix: int
    first: int
    numbers: NDArray[np.int64]


class Parameters:
    """Reads parameters, named and shaped as transformers holds them, from ``model``."""

    def __init__(
        self, model: Model, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._model = model
        self._shapes = shapes
        layout = {
            name: TensorInfo(name, shape, "F32", 4 * int(np.prod(shape)), Path("transformers"))
            for name, shape in shapes.items()
        }
        self._present = {tensor.name: tensor for tensor in model.tensors}
        architecture = find_architecture(config)
        self._uses = find_uses(architecture.tensors(config, layout))
        self._keys = architecture.key_places(config, layout)
        self.feeds: Mapping[str, list[Feed]] = architecture.feeds(config, layout)
        """Parameters whose outputs are inputs of tensors, by the parameter's name."""
        self.turned_columns: Mapping[str, NDArray[np.int64]] = {
            name: piece.turned_columns
            for name, uses in self._uses.items()
            if (piece := uses[0].piece).turns_columns
        }
        """For each column of a tensor the parameter's, where they are not the same."""
        self._fed = {feed.tensor for feeds in self.feeds.values() for feed in feeds}

    def uses(self, name: str) -> list[Use]:
        """Where the parameter's rows lie among GGUF's tensors; empty when the table ignores it."""
        return self._uses.get(name, [])

    def read(self, name: str) -> NDArray[Any]:
        """The parameter's values, float32, or bfloat16/float16 where nothing is lost by it."""
        if name in self._keys:
            key, layer = self._keys[name]
            return np.full(self._shapes[name], self._model.metadata[key].value[layer], np.float32)
        if not self.uses(name):
            raise ArchitectureError(f"nothing in {self._model.path} makes the parameter {name}")
        shape, read = self._shapes[name], partial(self._floats, name)
        return read_back(self.uses(name), 0, row_count(shape), read).reshape(shape)

    def lookup(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of a matrix whose rows are stored in order (an embedding), as `read` gives them.

        Only these rows are read, so a vocabulary of any size costs what a text uses of it.
        """
        use, *_ = self._uses[name]
        found = [self._floats(name, use.tensor, int(row), int(row) + 1) for row in rows]
        values: NDArray[Any] = use.piece.undo(np.concatenate(found))
        return values

    def targets(self, name: str, matrix: int) -> list[tuple[OutputTensor, int]]:
        """GGUF's tensors that hold ``matrix`` of the parameter, and its number in each.

        A parameter that is no stack has the one matrix 0, of which a tensor may make several. A
        tensor that is fed by another one's outputs stands for itself, and for no parameter.
        """
        if name in self._fed:
            return [(self._present[name], matrix)]
        shape = self._shapes[name]
        if len(shape) < 3:
            return [place for use in self.uses(name) for place in self._made(use)]
        found = []
        for use in self.uses(name):
            height = use.tensor.shape[-2]
            offset = matrix - use.piece.start // shape[-2]
            if 0 <= offset < -(-use.piece.stored_rows // shape[-2]):
                found.append((use.tensor, use.first // height + offset))
        return found

    def outputs(self, name: str, matrix: int) -> Iterator[OutputRows]:
        """The rows of GGUF's tensors that outputs of ``matrix`` of the parameter belong to.

        Those that are made of parts of stored rows are left out, but for columns of a stack's
        matrices (gate and up of gpt-oss, by turns).
        """
        shape = self._shapes[name]
        for use in self.uses(name):
            piece, height = use.piece, _height(use.tensor)
            if not piece.makes_outputs:
                columns = piece.source_columns() if len(shape) > 2 else None
                if columns is not None and piece.start // shape[-2] == matrix:
                    numbers = columns - matrix * shape[-1]
                    place = use.first
                    yield OutputRows(use.tensor, place // height, place % height, numbers)
                continue
            first, last, shift = 0, piece.rows, 0
            if len(shape) > 2:
                first = (matrix - piece.start // shape[-2]) * height
                last, shift = first + height, matrix * shape[-2]
                if not 0 <= first < piece.rows:
                    continue
                if piece.transposes:
                    shift = piece.start
            for start in range(first, last, height):
                numbers = piece.source_rows(start, min(start + height, last)) - shift
                place = use.first + start
                yield OutputRows(use.tensor, place // height, place % height, numbers)

    def _made(self, use: Use) -> Iterator[tuple[OutputTensor, int]]:
        """The tensor's matrices out of a parameter that is none of a stack."""
        if use.tensor.name not in self._fed:
            height = _height(use.tensor)
            for matrix in range(use.first // height, -(-(use.first + use.piece.rows) // height)):
                yield use.tensor, matrix

    def _floats(self, name: str, wanted: OutputTensor, start: int, stop: int) -> NDArray[Any]:
        """Rows of the model's tensor that ``wanted`` describes, decoded."""
        tensor = self._present.get(wanted.name)
        if tensor is None:
            raise ArchitectureError(
                f"{self._model.path} has no tensor {wanted.name}, which makes {name}"
            )
        if tensor.shape != wanted.shape:
            raise ArchitectureError(
                f"{self._model.path}: {tensor.name} has shape {tensor.shape}, "
                f"expected {wanted.shape}"
            )
        rows = self._model.read_rows(tensor, start, stop)
        if rows.dtype == np.uint8:
            if tensor.dtype not in FORMATS:
                raise ArchitectureError(
                    f"{self._model.path}: {tensor.name} has type {tensor.dtype}, "
                    "which quantcli cannot decode"
                )
            return native.decode(get_format(tensor.dtype), rows)
        rows = rows.astype(np.float32) if rows.dtype == np.float64 else rows
        bad = native.first_not_finite(rows) if rows.dtype.name in _WIDTHS else -1
        if bad >= 0:
            row, column = divmod(bad, rows.shape[1])
            stored, at, column_at = self._model.origin(tensor, start + row, column)
            raise WeightError(
                f"{stored.file}: tensor {stored.name}: the weight {float(rows[row, column])} at "
                f"row {at}, column {column_at} is not a finite number",
                hint="the checkpoint is damaged, or its training had diverged; get it again",
            )
        return rows


def _height(tensor: OutputTensor) -> int:
    """Rows of a matrix of the tensor."""
    return tensor.shape[-2] if len(tensor.shape) > 2 else tensor.rows
