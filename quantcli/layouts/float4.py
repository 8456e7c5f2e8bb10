"""MXFP4 and NVFP4 in safetensors: two E2M1 codes a byte, the even one in the low half.

MXFP4 has a power of two for each 32 weights (E8M0, often declared as bytes); NVFP4 an E4M3 scale
for each 16 and one float32 for the tensor, by which compressed-tensors divides
(``weight_global_scale``) and ModelOpt multiplies (``weight_scale_2``).
Sources: compressed-tensors' nvfp4 and mxfp4 compressors, and its converter of ModelOpt's folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np

from quantcli.errors import SourceError
from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import Codes
from quantcli.formats.microscale import VALUES
from quantcli.layouts.scaled import E4M3
from quantcli.layouts.stored import (
    FLOATS,
    Floats,
    RowWeight,
    StoredTensors,
    check_group,
    expect_shape,
    look_up_pairs,
    scale_groups,
    show,
    take_part,
)
from quantcli.layouts.stored_codes import Ranges, StoredCodes
from quantcli.types import PackedType, TensorInfo

MXFP4, NVFP4 = "MXFP4", "NVFP4"
GROUPS: Mapping[int, str] = {32: MXFP4, 16: NVFP4}
"""Weights under one scale, and what that makes the format."""

_SCALES: Mapping[str, tuple[str, ...]] = {MXFP4: ("U8", "F8_E8M0"), NVFP4: (E4M3,)}


@dataclass(frozen=True, slots=True)
class _Matrix:
    codes: str
    scales: str
    whole: str | None
    divides: bool


def build_float4(
    source: StoredTensors,
    codes: TensorInfo,
    name: str,
    method: str,
    group: int,
    *,
    whole: str | None,
    divides: bool = False,
) -> RowWeight:
    """The weight ``name`` of ``codes`` and ``{name}_scale`` in groups of 16 or 32.

    ``whole`` names the tensor's own scale, by which the others are multiplied, or divided where
    it ``divides``. SourceError when a part is missing or does not fit.
    """
    tensors = source.tensors
    take_part(tensors, codes.name, codes.name, ("U8",))
    if len(codes.shape) != 2 or group not in GROUPS:
        raise SourceError(
            f"{codes.file}: tensor {codes.name!r} has shape {list(codes.shape)} in groups of "
            f"{group}; a matrix of 4-bit floats in groups of 16 or 32 belongs there"
        )
    rows, columns = codes.shape[0], codes.shape[1] * 2
    check_group(codes, columns, group)
    kind = GROUPS[group]
    scales = take_part(tensors, f"{name}_scale", codes.name, _SCALES[kind])
    expect_shape(scales, (rows, columns // group), f"for groups of {group} in {codes.name!r}")
    parts = [codes.name, scales.name]
    if kind == MXFP4:
        whole = None
    if whole is not None:
        single = take_part(tensors, whole, codes.name, FLOATS)
        if single.elements != 1:
            expect_shape(single, (1,), f"for all of {codes.name!r}")
        parts.append(whole)
    info = show(name, (rows, columns), PackedType(f"{method} {kind}"), parts, tensors)
    matrix = _Matrix(codes.name, scales.name, whole, divides)
    coded = StoredCodes(
        FloatGrid("E2M1", "group", group, "E8M0" if kind == MXFP4 else "E4M3"),
        partial(_codes, matrix),
        partial(_ranges, matrix),
        None if whole is None else partial(_whole, matrix),
        multiplies=not divides,
    )
    return RowWeight(info, tuple(parts), partial(_decode, matrix), coded)


def _codes(matrix: _Matrix, source: StoredTensors, start: int, stop: int) -> Codes:
    pairs = source.load(matrix.codes, (start, stop))
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)


def _ranges(matrix: _Matrix, source: StoredTensors, start: int, stop: int) -> Ranges:
    stored = source.load(matrix.scales, (start, stop))
    is_e4m3 = source.tensors[matrix.scales].dtype == E4M3
    kind = ml_dtypes.float8_e4m3fn if is_e4m3 else ml_dtypes.float8_e8m0fnu
    scales: Floats = stored.view(kind).astype(np.float32)
    if matrix.whole is not None:
        whole = source.load(matrix.whole).astype(np.float32)
        scales = scales / whole if matrix.divides else scales * whole
    return scales, None


def _whole(matrix: _Matrix, source: StoredTensors) -> float:
    return float(source.load(matrix.whole or "").astype(np.float32).reshape(-1)[0])


def _decode(matrix: _Matrix, source: StoredTensors, start: int, stop: int) -> Floats:
    codes = source.load(matrix.codes, (start, stop))
    # VALUES are doubled.
    weights = look_up_pairs(codes, VALUES * np.float32(0.5), high_first=False)
    scales, _ = _ranges(matrix, source, start, stop)
    return scale_groups(weights.reshape(stop - start, -1), scales)
