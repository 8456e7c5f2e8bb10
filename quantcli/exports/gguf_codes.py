"""A GGUF's blocks as codes of grids, for layouts that hold the same grids.

Q4_0, Q5_0 and Q8_0 are symmetric groups of 32 (a scale times code less half the range), Q4_1 and
Q5_1 affine ones (a scale times code plus the value of code 0), MXFP4 and NVFP4 small floats under
scales of 32 and 16. Blocks that lie across a stored matrix's rows or columns cannot be put back,
and other block formats are on no grid: both are floats here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.checkpoint_view import CheckpointView, Read, Use, read_back
from quantcli.exports.blocks import GRIDS, GROUP, split_blocks
from quantcli.formats import nvfp4
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import GridCodes, IntegerGrid
from quantcli.formats.legacy import split_nibbles
from quantcli.layouts.base import CodeGrid
from quantcli.layouts.stored_codes import Ranges
from quantcli.model import Model
from quantcli.tensor_scales import row_scales
from quantcli.types import OutputTensor

_MX_BYTES = 17
Split = Callable[[Bytes], GridCodes]


def _integers(kind: str) -> Split:
    def split(packed: Bytes) -> GridCodes:
        return GridCodes(*split_blocks(kind, packed))

    return split


def _split_mxfp4(packed: Bytes) -> GridCodes:
    blocks = packed.reshape(-1, _MX_BYTES)
    codes = split_nibbles(blocks[:, 1:]).astype(np.uint8).reshape(len(packed), -1)
    powers = np.ascontiguousarray(blocks[:, 0]).view(ml_dtypes.float8_e8m0fnu)
    return GridCodes(codes, powers.astype(np.float32).reshape(len(packed), -1))


def _split_nvfp4(packed: Bytes) -> GridCodes:
    blocks = packed.reshape(-1, nvfp4.NBYTES)
    codes = nvfp4.split_codes(blocks).astype(np.uint8).reshape(len(packed), -1)
    # ggml's scales are halved, and its values doubled.
    scales = nvfp4.scales(blocks[:, : nvfp4.GROUPS].reshape(-1)) * np.float32(2)
    return GridCodes(codes, np.asarray(scales, np.float32).reshape(len(packed), -1))


_KINDS: Mapping[str, tuple[CodeGrid, Split]] = {
    kind: (
        IntegerGrid(grid.bits, "edge" if grid.affine else "middle", "group", GROUP, "F16"),
        _integers(kind),
    )
    for kind, grid in GRIDS.items()
} | {
    "MXFP4": (FloatGrid("E2M1", "group", 32, "E8M0"), _split_mxfp4),
    "NVFP4": (FloatGrid("E2M1", "group", nvfp4.GROUP, "E4M3", whole=1.0), _split_nvfp4),
}


@dataclass(frozen=True)
class CodedView(CheckpointView):
    """A GGUF as a checkpoint whose matrices are codes; a `CodedStore`.

    ``held`` are the stored tensors on a grid, with what splits their rows, which ``packed`` gives;
    ``factors`` the scales of whole tensors, by which NVFP4 is multiplied.
    """

    packed: Read | None = None
    held: Mapping[str, tuple[CodeGrid, Split]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def grids(self) -> Mapping[str, CodeGrid]:
        """The grid of each stored tensor that lies on one."""
        return {name: grid for name, (grid, _) in self.held.items()}

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Nothing is."""
        return ()

    def read_beside(self, name: str) -> NDArray[Any]:
        """KeyError, since there is nothing of the kind."""
        raise KeyError(name)

    def read_codes(self, name: str, start: int, stop: int) -> GridCodes:
        """Rows of a stored tensor."""
        _, split = self.held[name]
        coded = split(read_back(self.uses[name], start, stop, self.packed or self.read))
        factor = self.factors.get(name)
        if factor is None:
            return coded
        return replace(coded, scales=coded.scales * np.float32(factor))

    def read_ranges(self, name: str, start: int, stop: int) -> Ranges:
        """Their scales, and values of code 0."""
        coded = self.read_codes(name, start, stop)
        return coded.scales, coded.zeros

    def read_whole(self, name: str) -> tuple[float | None, bool]:
        """The scale of a whole tensor, which multiplies the others, if there is one."""
        factor = self.factors.get(name)
        return (self.held[name][0].whole, False) if factor is None else (factor, True)


def view_codes(view: CheckpointView, model: Model) -> CodedView:
    """``view`` of ``model`` with the codes of what is held in blocks of a grid.

    All else shows as floats.
    """
    held, tensors = {}, dict(view.tensors)
    factors: dict[str, float] = {}
    scales = row_scales(model)
    for name, uses in view.uses.items():
        kind = view.holder(name).dtype
        pieces = [use.piece for use in uses]
        whole = all(piece.makes_outputs and not piece.turns_columns for piece in pieces)
        whole &= all(use.tensor.dtype == kind for use in uses)
        own = {float(f) for use in uses for f in _factors(use, scales)}
        if kind in _KINDS and whole and len(own) < 2:
            held[name] = _KINDS[kind]
            if own:
                factors[name] = own.pop()
        elif kind in _KINDS or not whole:
            tensors[name] = replace(tensors[name], dtype="F32")
    present = {tensor.name: tensor for tensor in model.tensors}

    def packed(tensor: OutputTensor, start: int, stop: int) -> NDArray[Any]:
        return model.read_rows(present[tensor.name], start, stop)

    own_fields = {item.name: getattr(view, item.name) for item in fields(CheckpointView)}
    return CodedView(**own_fields | {"tensors": tensors}, packed=packed, held=held, factors=factors)


def _factors(use: Use, scales: Mapping[str, Floats]) -> Floats:
    """What the rows of a piece are multiplied by; nothing where they are not."""
    found = scales.get(use.tensor.name)
    if found is None:
        return np.empty(0, np.float32)
    return np.unique(found[use.first : use.first + use.piece.rows])
