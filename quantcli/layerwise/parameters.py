"""transformers' parameters out of any opened model: the architecture's table read backwards.

The table maps stored tensors to GGUF's; asked about the layout that transformers holds in memory
(which may fuse what a checkpoint keeps apart), it says which rows of which GGUF tensor make each
parameter. So a checkpoint in either layout and a GGUF of any type are one case, and a GGUF gives
the weights that llama.cpp would see, decoded by our kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError
from quantcli.formats import FORMATS, get_format, native
from quantcli.model import Model
from quantcli.types import OutputTensor, Piece, TensorInfo


@dataclass(frozen=True, slots=True)
class Use:
    """A piece of a parameter inside a GGUF tensor: its rows from ``first`` on."""

    tensor: OutputTensor
    piece: Piece
    first: int


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
        self._uses: dict[str, list[Use]] = {}
        for tensor in find_architecture(config).tensors(config, layout):
            first = 0
            for piece in tensor.pieces:
                self._uses.setdefault(piece.source, []).append(Use(tensor, piece, first))
                first += piece.rows

    def uses(self, name: str) -> list[Use]:
        """Where the parameter's rows lie among GGUF's tensors; empty when the table ignores it."""
        return self._uses.get(name, [])

    def read(self, name: str) -> NDArray[Any]:
        """The parameter's values, float32, or bfloat16/float16 where nothing is lost by it."""
        shape = self._shapes[name]
        whole: NDArray[Any] | None = None
        for use in self.uses(name):
            rows = self._rows(use, name)
            if whole is None:
                if _covers(use, rows, shape):
                    return rows.reshape(shape)
                # Pieces of several types meet in float32, which holds any of them.
                whole = np.empty(shape, np.float32 if self._mixed(name) else rows.dtype)
            _place(whole.reshape(-1, shape[-1]), use, rows)
        if whole is None:
            raise ArchitectureError(f"nothing in {self._model.path} makes the parameter {name}")
        return whole

    def lookup(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of a matrix whose rows are stored in order (an embedding), as `read` gives them.

        Only these rows are read, so a vocabulary of any size costs what a text uses of it.
        """
        (use,) = self._uses[name]
        tensor = self._checked(use, name)
        found = [self._model.read_rows(tensor, int(row), int(row) + 1) for row in rows]
        return self._floats(np.concatenate(found), use)

    def targets(self, name: str, matrix: int) -> list[tuple[OutputTensor, int]]:
        """GGUF's tensors that hold ``matrix`` of the parameter, and its number in each.

        A parameter that is no stack has the one matrix 0.
        """
        shape = self._shapes[name]
        if len(shape) < 3:
            return [(use.tensor, 0) for use in self.uses(name)]
        found = []
        for use in self.uses(name):
            height = use.tensor.shape[-2]
            offset = matrix - use.piece.start // shape[-2]
            if 0 <= offset < -(-use.piece.rows // shape[-2]):
                found.append((use.tensor, use.first // height + offset))
        return found

    def _mixed(self, name: str) -> bool:
        tensors = [self._present.get(use.tensor.name) for use in self._uses[name]]
        return len({tensor.dtype for tensor in tensors if tensor}) > 1

    def _checked(self, use: Use, name: str) -> OutputTensor:
        tensor = self._present.get(use.tensor.name)
        if tensor is None:
            raise ArchitectureError(
                f"{self._model.path} has no tensor {use.tensor.name}, which makes {name}"
            )
        if tensor.shape != use.tensor.shape:
            raise ArchitectureError(
                f"{self._model.path}: {tensor.name} has shape {tensor.shape}, "
                f"expected {use.tensor.shape}"
            )
        return tensor

    def _rows(self, use: Use, name: str) -> NDArray[Any]:
        tensor = self._checked(use, name)
        rows = self._model.read_rows(tensor, use.first, use.first + use.piece.rows)
        return self._floats(rows, use)

    def _floats(self, rows: NDArray[Any], use: Use) -> NDArray[Any]:
        if rows.dtype == np.uint8:
            kind = self._present[use.tensor.name].dtype
            if kind not in FORMATS:
                raise ArchitectureError(
                    f"{self._model.path}: {use.tensor.name} has type {kind}, "
                    "which quantcli cannot decode"
                )
            rows = native.decode(get_format(kind), rows)
        elif rows.dtype == np.float64:
            rows = rows.astype(np.float32)
        if use.piece.add:
            rows = rows.astype(np.float32) - np.float32(use.piece.add)
        return rows


def _covers(use: Use, rows: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Whether these rows are the whole parameter as they stand."""
    piece = use.piece
    return piece.view is None and not piece.transpose and rows.size == int(np.prod(shape))


def _place(target: NDArray[Any], use: Use, rows: NDArray[Any]) -> None:
    """Undo a piece: put its rows where transformers has them."""
    piece = use.piece
    if len(use.tensor.shape) < 2:
        target[0, piece.element_order(target.shape[1])] = rows[0]
    elif piece.transpose:
        target[:, piece.start : piece.start + piece.rows] = rows.T
    else:
        target[piece.source_rows(0, piece.rows)] = rows
