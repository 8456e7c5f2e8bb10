"""gpt-oss' own storage of experts: MXFP4, a stack of transposed matrices in one tensor.

``X_blocks`` has shape (experts, outputs, inputs/32, 16), two E2M1 codes a byte, the even input in
the low half; ``X_scales`` (experts, outputs, inputs/32) their powers of two as E8M0. The weight
``X`` that they stand for has inputs as rows: (experts, inputs, outputs). GGUF keeps outputs as
rows and the same codes in another order, so its blocks are made without decoding anything.
Source: ``convert_moe_packed_tensors`` of transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.microscale import VALUES
from quantcli.layouts.settings import Settings
from quantcli.layouts.stored import (
    Floats,
    PackedWeight,
    Span,
    StoredTensors,
    expect_shape,
    look_up_pairs,
    scale_groups,
    show,
    take_part,
)
from quantcli.types import PackedType, TensorInfo

_GROUP, _BYTES = 32, 16
_CODES, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A stack (experts, inputs, outputs) in MXFP4, whose columns are rows of GGUF's blocks."""

    info: TensorInfo
    blocks: ClassVar[str] = "MXFP4"

    @property
    def parts(self) -> tuple[str, ...]:
        """Codes and scales."""
        return (self.info.name + _CODES, self.info.name + _SCALES)

    def read(self, source: StoredTensors, rows: Span, columns: Span) -> Floats:
        """A rectangle of the stack, its matrices' inputs being the flattened rows."""
        _, inputs, outputs = self.info.shape
        groups, (codes, scales) = inputs // _GROUP, self.parts
        found = np.empty((rows[1] - rows[0], columns[1] - columns[0]), np.float32)
        for matrix in range(rows[0] // inputs, -(-rows[1] // inputs)):
            first = max(rows[0] - matrix * inputs, 0)
            last = min(rows[1] - matrix * inputs, inputs)
            low, high = first // _GROUP, -(-last // _GROUP)
            span = matrix * outputs + columns[0], matrix * outputs + columns[1]
            packed = source.load(codes, span, (low * _BYTES, high * _BYTES), width=groups * _BYTES)
            # VALUES are doubled.
            values = look_up_pairs(packed, VALUES * np.float32(0.5), high_first=False)
            powers = source.load(scales, span, (low, high)).view(ml_dtypes.float8_e8m0fnu)
            weights = scale_groups(values.reshape(len(packed), -1), powers.astype(np.float32))
            place = matrix * inputs + first - rows[0]
            kept = weights[:, first - low * _GROUP : last - low * _GROUP]
            found[place : place + last - first] = kept.T
        return found

    def read_blocks(self, source: StoredTensors, start: int, stop: int) -> NDArray[np.uint8]:
        """GGUF's blocks of some columns, those of all matrices counted through."""
        codes, scales = self.parts
        groups = self.info.shape[1] // _GROUP
        packed = source.load(codes, (start, stop), width=groups * _BYTES)
        packed = packed.reshape(stop - start, groups, _BYTES)
        blocks = np.empty((stop - start, groups, 1 + _BYTES), np.uint8)
        blocks[:, :, 0] = source.load(scales, (start, stop))
        # A byte holds weights 2j and 2j + 1 here, j and j + 16 there.
        lower, upper = packed[:, :, :8], packed[:, :, 8:]
        blocks[:, :, 1::2] = lower & 15 | upper << 4
        blocks[:, :, 2::2] = lower >> 4 | upper & 0xF0
        return blocks.reshape(stop - start, -1)


def find_mxfp4(source: StoredTensors, settings: Settings) -> dict[str, PackedWeight]:
    """Every stack in blocks, by its name; SourceError names the first part that is wrong."""
    found: dict[str, PackedWeight] = {}
    for name in source.tensors:
        if not name.endswith(_CODES):
            continue
        stem = name.removesuffix(_CODES)
        codes = take_part(source.tensors, name, name, ("U8",))
        if len(codes.shape) != 4 or codes.shape[-1] != _BYTES:
            raise SourceError(
                f"{codes.file}: tensor {name!r} has shape {list(codes.shape)}; experts, outputs "
                f"and blocks of {_BYTES} bytes belong there"
            )
        scales = take_part(source.tensors, stem + _SCALES, name, ("U8", "F8_E8M0"))
        expect_shape(scales, codes.shape[:-1], f"for the blocks of {name!r}")
        experts, outputs, groups, _ = codes.shape
        shape = (experts, groups * _GROUP, outputs)
        parts = (name, scales.name)
        found[stem] = BlockWeight(
            show(stem, shape, PackedType("MXFP4 blocks"), parts, source.tensors)
        )
    return found
