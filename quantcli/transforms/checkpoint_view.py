"""A transformed model as the checkpoint that would hold it: its tensors under their stored names.

A transform speaks of GGUF's tensors. A model folder keeps the checkpoint's, so each stored tensor
is put together again from the rows of the GGUF tensors that were made of it: the architecture's
pieces read backwards, rows that RoPE's layout permutes back in their places, transposed matrices
turned, what was added to a norm (Gemma's one) taken off. What no transform touches comes as it is
stored.

A head that a transform makes out of the embeddings gets the name that the architecture's table has
for it, and config.json then says that the two are not tied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import find_architecture
from quantcli.model import Model
from quantcli.plan.folders import FolderPlan
from quantcli.plan.names import HEAD_NAME
from quantcli.transforms.transformed_model import TransformedModel
from quantcli.types import Note, OutputTensor, Piece, TensorInfo, TensorStore


@dataclass(frozen=True, slots=True)
class _Use:
    """Where a stored tensor's rows are: piece ``piece`` of ``tensor``, from its row ``first``."""

    tensor: OutputTensor
    piece: Piece
    first: int


class TransformedStore:
    """A `TensorStore` of what ``model``'s checkpoint would store after its transforms.

    What a transform changed comes as float32; its `TensorInfo` keeps the dtype that it is stored
    in, since that is what it will be written as.
    """

    def __init__(
        self,
        model: Model,
        store: TensorStore,
        tensors: Mapping[str, TensorInfo],
        uses: Mapping[str, list[_Use]],
    ) -> None:
        self._model = model
        self._store = store
        self._tensors = tensors
        self._uses = uses

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by name."""
        return self._tensors

    @property
    def changed(self) -> frozenset[str]:
        """Stored tensors that a transform changed or made."""
        return frozenset(self._uses)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop``, as `TensorStore.read_rows`."""
        uses = self._uses.get(name)
        if uses is None:
            return self._store.read_rows(name, start, stop)
        shape = self._tensors[name].shape
        found = np.empty((stop - start, shape[-1] if shape else 1), np.float32)
        for use in uses:
            self._place(found, use, start, stop)
        return found

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Columns ``start:stop`` as rows, as `TensorStore.read_columns`."""
        uses = self._uses.get(name)
        if uses is None:
            return self._store.read_columns(name, start, stop)
        found = np.empty((stop - start, self._tensors[name].shape[0]), np.float32)
        for use in uses:
            if use.piece.transpose:
                self._fill(found, use, start, stop)
            else:
                rows = self.read_rows(name, 0, self._tensors[name].shape[0])
                return np.ascontiguousarray(rows[:, start:stop].T)
        return found

    def close(self) -> None:
        """Release the files."""
        self._store.close()

    def _place(self, found: NDArray[Any], use: _Use, start: int, stop: int) -> None:
        piece, tensor = use.piece, use.tensor
        if len(tensor.shape) < 2:
            row = self._read(use, 0, 1)
            found[0, piece.element_order(tensor.columns)] = row[0]
        elif piece.transpose:
            rows = self._read(use, use.first, use.first + piece.rows)
            found[:, piece.start : piece.start + piece.rows] = rows[:, start:stop].T
        else:
            self._fill(found, use, start, stop)

    def _fill(self, found: NDArray[Any], use: _Use, start: int, stop: int) -> None:
        """The piece's part of the stored rows ``start:stop`` (columns, where it is transposed)."""
        piece = use.piece
        low, high = max(start, piece.start), min(stop, piece.start + piece.rows)
        if low < high:
            own = use.first + piece_rows(piece)[low - piece.start : high - piece.start]
            # Rows change places within a head, so this is little more than what is wanted.
            first = int(own.min())
            rows = self._read(use, first, int(own.max()) + 1)
            found[low - start : high - start] = rows[own - first]

    def _read(self, use: _Use, start: int, stop: int) -> NDArray[np.float32]:
        rows = self._model.read_floats(use.tensor, start, stop)
        return rows - np.float32(use.piece.add) if use.piece.add else rows


def as_checkpoint(model: Model) -> Model:
    """``model`` as a checkpoint of its own, whose store holds the transformed weights.

    Planned, run and written like any checkpoint. Nothing is read.
    """
    names = _changed(model)
    stored = dict(model.store.tensors)
    tensors = []
    uses: defaultdict[str, list[_Use]] = defaultdict(list)
    for own in model.tensors:
        tensor = own
        if own.name in names:
            if _is_new(model, own.name):
                tensor = _apart(model, own, stored)
            tensor = replace(tensor, dtype="F32", values=None)
        tensors.append(tensor)
        first = 0
        for piece in tensor.pieces:
            uses[piece.source].append(_Use(own, piece, first))
            first += piece.rows
    touched = {
        source: found
        for source, found in uses.items()
        if any(use.tensor.name in names for use in found)
    }
    config = dict(model.config)
    if HEAD_NAME in names and config.get("tie_word_embeddings") is not False:
        config["tie_word_embeddings"] = False
    return Model(
        model.label, model.path, model.arch, model.metadata, tuple(tensors),
        TransformedStore(model, model.store, stored, touched), model.from_gguf, config,
        model.notes, model.repo, model.revision,
    )  # fmt: skip


def note_copies(model: Model, plan: FolderPlan) -> Iterator[Note]:
    """A remark on changed matrices that the folder copies, rounded to its dtype once more."""
    if not isinstance(model.store, TransformedStore):
        return
    found = [
        copy
        for copy in plan.copies
        if copy.source in model.store.changed and copy.rows > 1 and copy.dtype != "F32"
    ]
    if found:
        yield Note(
            f"{len(found)} matrices that are not quantized were transformed and are rounded to "
            f"{found[0].dtype} again, such as {found[0].name}; --dtype F32 keeps them exact"
        )


@lru_cache(maxsize=64)
def piece_rows(piece: Piece) -> NDArray[np.int64]:
    """The piece's row behind each stored row of it."""
    if piece.view is None:
        return np.arange(piece.rows, dtype=np.int64)
    return np.argsort(piece.source_rows(0, piece.rows))


def _changed(model: Model) -> set[str]:
    """GGUF tensors that any transform of the chain changes."""
    names: set[str] = set()
    while isinstance(model, TransformedModel):
        names |= model.transform.operations.keys()
        model = model.base
    return names


def _is_new(model: Model, name: str) -> bool:
    """Whether the checkpoint has no such tensor."""
    while isinstance(model, TransformedModel):
        model = model.base
    return all(tensor.name != name for tensor in model.tensors)


def _apart(model: Model, tensor: OutputTensor, stored: dict[str, TensorInfo]) -> OutputTensor:
    """A tensor that a transform made out of another's rows, stored by itself from now on."""
    name = find_architecture(model.config).sources(model.config)[tensor.name]
    source = stored[tensor.pieces[0].source]
    stored[name] = replace(source, name=name)
    return replace(tensor, pieces=(Piece(name, tensor.rows),))
