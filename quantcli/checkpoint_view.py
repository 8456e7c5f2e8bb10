"""An opened model's tensors under their stored names, in stored order: its pieces read backwards.

A GGUF, or a model whose weights are transformed, is seen as the checkpoint that would hold it. Rows
come slab by slab, so that no tensor need be in memory as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.pieces import Piece, read_scattered
from quantcli.types import OutputTensor, TensorInfo, TensorStore

_BAND = 256
"""Output rows that are read at a time where columns of them are wanted."""

Read = Callable[[OutputTensor, int, int], NDArray[Any]]
"""Gives rows of an output tensor."""


@dataclass(frozen=True, slots=True)
class Use:
    """A piece of a stored tensor inside an output tensor: its rows from ``first`` on."""

    tensor: OutputTensor
    piece: Piece
    first: int


def find_uses(tensors: Iterable[OutputTensor]) -> dict[str, list[Use]]:
    """Where the output ``tensors`` use stored ones, by the stored tensor's name."""
    found: defaultdict[str, list[Use]] = defaultdict(list)
    for tensor in tensors:
        first = 0
        for piece in tensor.pieces:
            found[piece.source].append(Use(tensor, piece, first))
            first += piece.rows
    return dict(found)


def read_back(uses: Sequence[Use], start: int, stop: int, read: Read) -> NDArray[Any]:
    """Rows ``start:stop`` of the stored tensor behind ``uses``, out of the output tensors' rows.

    They have the dtype that ``read`` gives; pieces of several dtypes meet in float32, which holds
    any of them. Packed rows stay packed, where every piece keeps rows whole. ValueError where no
    piece holds such rows.
    """
    low, high = _widen(uses, start, stop)
    found = _Found(high - low)
    for use in uses:
        piece = use.piece
        first = max(low - piece.start, 0)
        last = min(high - piece.start, piece.stored_rows)
        if first < last:
            if piece.order is None and (last - first) == stop - start:
                return _read_piece(use, first, last, read=read)
            _place(found, piece.start - low, use, first, last, read)
    if found.values is None:
        raise ValueError(f"no output tensor holds rows {start} to {stop} of a stored one")
    return found.values[start - low : stop - low]


@dataclass
class _Found:
    """The stored rows, allocated once their width and dtype are known."""

    rows: int
    values: NDArray[Any] | None = None

    def part(self, first: int, last: int, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Rows ``first:last``, to be written in ``dtype`` or float32."""
        if self.values is None:
            self.values = np.empty((self.rows, width), dtype)
        elif self.values.dtype != dtype:
            self.values = self.values.astype(np.float32, copy=False)
        return self.values[first:last]


def _place(found: _Found, offset: int, use: Use, first: int, last: int, read: Read) -> None:
    """Put the piece's stored rows ``first:last`` where they belong; its row 0 is at ``offset``."""
    piece, own = use.piece, partial(_read_piece, use, read=read)
    if piece.order is None:
        rows = own(first, last)
        found.part(offset + first, offset + last, rows.shape[1], rows.dtype)[...] = rows
    elif piece.keeps_rows:
        places = piece.output_rows(first, last)
        held = places >= 0
        if held.any():
            rows = read_scattered(own, places[held])
            found.part(offset + first, offset + last, rows.shape[1], rows.dtype)[held] = rows
    elif piece.transposes:
        for low in range(0, piece.rows, _BAND):
            high = min(low + _BAND, piece.rows)
            rows = own(low, high)
            target = found.part(offset + first, offset + last, piece.rows, rows.dtype)
            target[:, low:high] = rows[:, first:last].T
    else:
        made, stored = piece.group
        rows = own(first // stored * made, last // stored * made)
        piece.put(found.part(offset + first, offset + last, piece.order.columns, rows.dtype), rows)


def _read_piece(use: Use, start: int, stop: int, *, read: Read) -> NDArray[Any]:
    """The piece's rows ``start:stop`` with the values that are stored."""
    rows: NDArray[Any] = use.piece.undo(read(use.tensor, use.first + start, use.first + stop))
    return rows


def _widen(uses: Sequence[Use], start: int, stop: int) -> tuple[int, int]:
    """The stored rows ``start:stop``, and those without which theirs cannot be made."""
    low, high = start, stop
    for piece in (use.piece for use in uses):
        first, last = max(start - piece.start, 0), min(stop - piece.start, piece.stored_rows)
        if first < last and not piece.keeps_rows and not piece.transposes:
            stored = piece.group[1]
            low = min(low, piece.start + first // stored * stored)
            high = max(high, piece.start - (-last // stored) * stored)
    return (low, high) if (low, high) == (start, stop) else _widen(uses, low, high)


@dataclass(frozen=True)
class CheckpointView:
    """A `TensorStore` of the stored ``tensors`` behind a model's output tensors.

    ``uses`` says where each lies, ``read`` gives an output tensor's rows as they are held and
    ``decode`` makes floats of them. Stored tensors without uses are read from ``rest``.
    """

    tensors: Mapping[str, TensorInfo]
    uses: Mapping[str, Sequence[Use]]
    read: Read
    decode: Callable[[OutputTensor, NDArray[Any]], NDArray[Any]]
    rest: TensorStore | None = None

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop`` of a stored tensor as a new float array (rows, columns)."""
        if self.rest is not None and name not in self.uses:
            return self.rest.read_rows(name, start, stop)
        return read_back(self.uses[name], start, stop, self._floats)

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Columns ``start:stop`` of a stored matrix, transposed, as `read_rows` gives rows.

        Of a stack's matrices they are counted through, and come of one at a time.
        """
        if self.rest is not None and name not in self.uses:
            return self.rest.read_columns(name, start, stop)
        first, shape = self.uses[name][0], self.tensors[name].shape
        if first.piece.transposes and len(shape) == 2:
            return _read_piece(first, start, stop, read=self._floats)
        height, width = shape[-2:]
        matrix = start // max(1, width)
        rows = self.read_rows(name, matrix * height, (matrix + 1) * height)
        return np.ascontiguousarray(rows[:, start - matrix * width : stop - matrix * width].T)

    def holder(self, name: str) -> OutputTensor:
        """The output tensor that holds a stored one, the first where several do."""
        if name in self.uses:
            return self.uses[name][0].tensor
        info = self.tensors[name]
        return OutputTensor(name, info.shape, info.dtype)

    def close(self) -> None:
        """Release the files of ``rest``."""
        if self.rest is not None:
            self.rest.close()

    def _floats(self, tensor: OutputTensor, start: int, stop: int) -> NDArray[Any]:
        return self.decode(tensor, self.read(tensor, start, stop))
