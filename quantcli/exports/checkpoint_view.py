"""A GGUF as the checkpoint it was made from: tensors under their stored names, in stored order.

The architecture's table says which rows of which GGUF tensor came from which stored tensor; read
backwards, it undoes permuted heads, stacked experts, transposed weights and shifted norms. Rows
come slab by slab, decoded by our kernels, so that no tensor need be in memory as a whole.

Refused: a GGUF that lacks a tensor which its table knows, holds one in another shape, or has one
that the table does not know.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import find_architecture
from quantcli.archs.inverse import rebuild_config
from quantcli.errors import ArchitectureError
from quantcli.formats import FORMATS, get_format, native
from quantcli.model import Model
from quantcli.sources.hf import read_config
from quantcli.types import OutputTensor, Piece, TensorInfo, row_count

_SPREAD = 4
"""Permuted rows are read as one span when it is at most this many times the rows wanted."""
_BAND = 256
"""Rows of a GGUF tensor that are decoded at a time where columns are wanted."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a stored tensor lies: in ``tensor`` from row ``first`` on, as ``piece`` changes it."""

    tensor: OutputTensor
    piece: Piece
    first: int

    @property
    def in_order(self) -> bool:
        """Whether rows of the GGUF are rows of the stored tensor, whole, if in another order."""
        return not self.piece.transpose and not self.piece.add


class StoredView:
    """The stored tensors of the GGUF ``model``, which ``config`` describes (config.json).

    ``tensors`` are their descriptions by name, in the order of the architecture's table; their
    dtype is the GGUF tensor's and their size what the GGUF spends on them.
    """

    def __init__(self, model: Model, config: Mapping[str, Any]) -> None:
        architecture = find_architecture(config)
        present = {tensor.name: tensor for tensor in model.tensors}
        layout = {
            name: TensorInfo(name, shape, "F32", 4 * int(np.prod(shape)), model.path)
            for name, shape in architecture.stored(config, present).items()
        }
        self._model = model
        self.homes: dict[str, Home] = {}
        known = architecture.tensors(config, layout)
        _refuse_others(model, {tensor.name for tensor in known})
        for wanted in known:
            tensor = _check(model.path, wanted, present)
            first = 0
            for piece in wanted.pieces:
                self.homes[piece.source] = Home(tensor, piece, first)
                first += piece.rows
        self.tensors = {
            name: TensorInfo(
                name, info.shape, self.homes[name].tensor.dtype, self._share(info), info.file
            )
            for name, info in layout.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop`` of a stored tensor as a new float array (rows, columns).

        The dtype is the GGUF's where that is a float, else float32.
        """
        home = self.homes[name]
        if len(self.tensors[name].shape) < 2:
            row = self._floats(home, self._model.read_rows(home.tensor, 0, 1))
            values = np.empty_like(row)
            values[0, home.piece.element_order(row.shape[1])] = row[0]
        elif home.piece.transpose:
            values = self._columns(home, start, stop)
        else:
            values = self._floats(home, self.read_stored(name, start, stop))
        if home.piece.add:
            values = values.astype(np.float32) - np.float32(home.piece.add)
        return values

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Columns ``start:stop`` of a stored matrix, transposed, as `read_rows` gives rows."""
        rows = self.read_rows(name, 0, row_count(self.tensors[name].shape))
        return np.ascontiguousarray(rows[:, start:stop].T)

    def close(self) -> None:
        """Nothing is held here: the GGUF's own store is closed with its model."""

    def read_stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """The same rows as the GGUF holds them; of a block format its packed bytes (uint8).

        Only for a matrix whose home is ``in_order``.
        """
        home = self.homes[name]
        piece, tensor = home.piece, home.tensor
        if piece.view is None:
            return self._model.read_rows(tensor, home.first + start, home.first + stop)
        places = np.argsort(piece.source_rows(0, piece.rows), kind="stable")[start:stop]
        wanted = home.first + places
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low <= _SPREAD * len(wanted):
            rows = self._model.read_rows(tensor, low, high)
            return np.ascontiguousarray(rows[wanted - low])
        return np.concatenate(
            [self._model.read_rows(tensor, int(row), int(row) + 1) for row in wanted]
        )

    def _share(self, info: TensorInfo) -> int:
        tensor = self.homes[info.name].tensor
        whole = self._model.stored_bytes(tensor)
        return whole * row_count(info.shape[-2:]) * info.shape[-1] // max(1, tensor.elements)

    def _columns(self, home: Home, start: int, stop: int) -> NDArray[Any]:
        """Columns of the GGUF tensor as rows; it is read band by band."""
        rows = home.piece.rows
        values: NDArray[Any] | None = None
        for low in range(0, rows, _BAND):
            high = min(low + _BAND, rows)
            band = self._floats(
                home, self._model.read_rows(home.tensor, home.first + low, home.first + high)
            )
            if values is None:
                values = np.empty((stop - start, rows), band.dtype)
            values[:, low:high] = band[:, start:stop].T
        assert values is not None
        return values

    def _floats(self, home: Home, rows: NDArray[Any]) -> NDArray[Any]:
        if rows.dtype != np.uint8:
            return rows
        return native.decode(get_format(home.tensor.dtype), rows)


def as_checkpoint(model: Model, config: Mapping[str, Any], view: StoredView) -> Model:
    """The GGUF ``model`` as the checkpoint that ``view`` shows, for what works on checkpoints.

    Its tensors' sizes are those of the float32 rows that are read, by which others cut slabs.
    """
    floats = copy(view)
    floats.tensors = {n: replace(i, nbytes=4 * i.elements) for n, i in view.tensors.items()}
    tensors = find_architecture(config).tensors(config, floats.tensors)
    return replace(
        model, tensors=tuple(tensors), store=floats, from_gguf=False, config=config, notes=()
    )


def find_config(model: Model, folder: Path | None = None) -> dict[str, Any]:
    """The config.json of a GGUF's model: rebuilt from its key-values, or that of ``folder``.

    What llama.cpp takes for granted of the architecture is written out, since not every reader
    assumes the same. Raises ArchitectureError when the key-values do not determine one.
    """
    if folder is not None:
        config = read_config(folder)
        if "text_config" in config:
            raise ArchitectureError(
                f"{folder}: config.json is of a model that does not only read text, but a GGUF "
                "holds the text model",
                hint="leave --config out",
            )
        return config
    tensors = {tensor.name: tensor for tensor in model.tensors}

    def read(name: str) -> NDArray[np.float32]:
        rows = model.read_rows(tensors[name], 0, tensors[name].rows)
        if rows.dtype != np.uint8:
            return rows.astype(np.float32, copy=False)
        return native.decode(get_format(tensors[name].dtype), rows)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = rebuild_config(model.arch, model.metadata, shapes, read)
    fixed = find_architecture(config).fixed
    return {**{key: values[0] for key, values in fixed.items() if values}, **config}


def _refuse_others(model: Model, known: Container[str]) -> None:
    other = next((tensor.name for tensor in model.tensors if tensor.name not in known), None)
    if other is not None:
        raise ArchitectureError(
            f"{model.path} has the tensor {other}, which quantcli does not know in {model.arch} "
            "models, so a checkpoint without it would be another model"
        )


def _check(path: Path, wanted: OutputTensor, present: Mapping[str, OutputTensor]) -> OutputTensor:
    tensor = present.get(wanted.name)
    if tensor is None:
        raise ArchitectureError(f"{path} has no tensor {wanted.name}, which its model needs")
    if tensor.shape != wanted.shape:
        raise ArchitectureError(
            f"{path}: {tensor.name} has shape {tensor.shape}, expected {wanted.shape}"
        )
    if tensor.dtype not in FORMATS:
        raise ArchitectureError(
            f"{path}: {tensor.name} has type {tensor.dtype}, which quantcli cannot decode"
        )
    return tensor
