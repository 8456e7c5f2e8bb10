"""MXFP4 and NVFP4 of a checkpoint as GGUF's blocks: the same codes and scales, byte for byte.

NVFP4's scale of the whole matrix becomes the tensor ``….scale`` beside the weight, by which
llama.cpp multiplies where its graph of the architecture does. Files that divide by it have its
reciprocal, so decoded weights may differ in float32's last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.nvfp4_scales import scale_name
from quantcli.errors import PlanError
from quantcli.formats import get_format, native, nvfp4
from quantcli.formats.base import Bytes
from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.legacy import join_nibbles
from quantcli.layouts.stored_codes import CodedStore
from quantcli.model import Model
from quantcli.pieces import Piece, read_scattered
from quantcli.plan.planner import TensorPlan
from quantcli.plan.same_grid import equal_weights
from quantcli.tensor_scales import takes_scale
from quantcli.types import OutputTensor

MXFP4, NVFP4 = "MXFP4", "NVFP4"
_KINDS = {("E2M1", "E8M0"): MXFP4, ("E2M1", "E4M3"): NVFP4}


def block_format(model: Model, tensor: OutputTensor) -> str | None:
    """The block format whose grid all parts of a tensor are on, if it is one of small floats.

    None as well where codes lie across rows.
    """
    store = model.store
    if not isinstance(store, CodedStore):
        return None
    grids = store.grids
    found = {grids.get(piece.source) for piece in tensor.pieces}
    grid = found.pop() if len(found) == 1 else None
    whole = all(piece.keeps_rows and piece.pointwise is None for piece in tensor.pieces)
    if not isinstance(grid, FloatGrid) or not whole:
        return None
    return _KINDS.get((grid.kind, grid.scales))


@dataclass(frozen=True)
class Float4Blocks:
    """Encodes tensors from their stored codes, and the scales beside them.

    ``kinds`` are the block formats of the tensors, by their names; ``scales`` has a factor for each
    matrix of those in NVFP4. `add` refuses what llama.cpp does not compute.
    """

    model: Model
    hint: str
    kinds: dict[str, str] = field(default_factory=dict)
    scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def add(self, tensor: OutputTensor, kind: str) -> None:
        """Take a tensor on; PlanError for one that the block format does not hold."""
        size = get_format(kind).block
        if tensor.columns % size:
            raise self._refuse(tensor, kind, f"blocks of {size} do not divide its rows")
        self.kinds[tensor.name] = kind
        if kind == NVFP4:
            self.scales[tensor.name] = self._find_scales(tensor)

    def encoders(self) -> Mapping[str, Any]:
        """This, by the names of all tensors that were taken on and of their scales."""
        tensors = [tensor for tensor in self.model.tensors if tensor.name in self.scales]
        weights = dict.fromkeys(self.kinds, self._encode)
        return weights | {scale_name(tensor): self._encode_scale for tensor in tensors}

    def _find_scales(self, tensor: OutputTensor) -> NDArray[np.float32]:
        factors = np.array([self._factor(piece) for piece in tensor.pieces], np.float32)
        count = tensor.matrices
        if len(factors) != count:
            if (factors != factors[0]).any():
                raise self._refuse(tensor, NVFP4, "its parts have several scales of the matrix")
            factors = np.repeat(factors[:1], count)
        names = dict.fromkeys(each.name for each in self.model.tensors)
        if (factors != 1).any() and not takes_scale(self.model.arch, tensor.name, names):
            why = f"llama.cpp multiplies by no scale of it in {self.model.arch} models"
            raise self._refuse(tensor, NVFP4, why)
        return factors

    def _encode_scale(self, item: TensorPlan, start: int, rows: NDArray[Any]) -> Bytes:
        by_scale = {scale_name(t): t.name for t in self.model.tensors if t.name in self.scales}
        return self.scales[by_scale[item.tensor.name]].view(np.uint8).reshape(1, -1)

    def _encode(self, item: TensorPlan, start: int, rows: NDArray[Any]) -> Bytes:
        tensor, parts, first = item.tensor, [], 0
        kind, stop = self.kinds[item.tensor.name], start + len(rows)
        for piece in tensor.pieces:
            low, high = max(start, first), min(stop, first + piece.rows)
            if low < high:
                parts.append(self._pack(piece, kind, low - first, high - first))
            first += piece.rows
        packed = np.concatenate(parts)
        decoded = native.decode(get_format(kind), packed)
        if kind == NVFP4:
            factors = self.scales[tensor.name]
            own = np.arange(start, stop) // (tensor.rows // len(factors))
            # A factor beyond all sense gives weights that equal none.
            with np.errstate(over="ignore", invalid="ignore"):
                decoded = decoded * factors[own, None]
        if not equal_weights(decoded, rows, exact=kind != NVFP4).all():
            raise self._refuse(tensor, kind, "its scales are none of the format's")
        return packed

    def _pack(self, piece: Piece, kind: str, start: int, stop: int) -> Bytes:
        """Blocks of a piece's rows."""
        store, wanted = self._store, piece.source_rows(start, stop)
        codes = read_scattered(lambda *rows: store.read_codes(piece.source, *rows).codes, wanted)
        scales = read_scattered(lambda *rows: store.read_ranges(piece.source, *rows)[0], wanted)
        if kind == MXFP4:
            grid = FloatGrid("E2M1", "group", 32, "E8M0")
            heads = grid.scale_codes(scales).reshape(-1, 1)
            nibbles = join_nibbles(codes.reshape(-1, 32).astype(np.int32))
        else:
            whole = float(1 / self._factor(piece))
            grid = FloatGrid("E2M1", "group", nvfp4.GROUP, "E4M3", whole=whole)
            heads = grid.scale_codes(scales).reshape(-1, nvfp4.GROUPS)
            nibbles = nvfp4.join_codes(codes.reshape(-1, nvfp4.GROUP).astype(np.int32))
        return np.concatenate([heads, nibbles], axis=1).reshape(len(codes), -1)

    def _factor(self, piece: Piece) -> np.float32:
        """What block scales of NVFP4 are multiplied by."""
        whole, multiplies = self._store.read_whole(piece.source)
        value = np.float32(1.0 if whole is None else whole)
        return value if multiplies else np.float32(1) / value

    @property
    def _store(self) -> CodedStore:
        store = self.model.store
        if not isinstance(store, CodedStore):
            raise TypeError(f"{self.model.label} has no codes")
        return store

    def _refuse(self, tensor: OutputTensor, kind: str, why: str) -> PlanError:
        what = f"{self.model.label}: {tensor.name} ({tensor.dtype})"
        return PlanError(f"{what} does not become {kind}: {why}", hint=self.hint)
