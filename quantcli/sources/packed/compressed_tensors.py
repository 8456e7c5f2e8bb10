"""compressed-tensors: packed and plain integers, FP8, MXFP4 and NVFP4, side by side if need be.

* ``X.weight_packed`` (int32) with ``X.weight_scale``, ``X.weight_shape``, and for asymmetric ones
  ``X.weight_zero_point``, packed along the outputs; ``X.weight_g_idx`` where groups follow an
  ordering by activation;
* ``X.weight`` (int8 or E4M3) with ``X.weight_scale`` and perhaps ``X.weight_zero_point``;
* ``X.weight_packed`` (uint8) of E2M1 codes with ``X.weight_scale`` and, for NVFP4, one
  ``X.weight_global_scale`` (`float4`).

What was written of activations is of no use here. Source: the library's compressors (0.20).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from quantcli.errors import SourceError
from quantcli.layouts.packing import compressed_tensors as layout
from quantcli.sources.packed.float4 import build_float4
from quantcli.sources.packed.fp8 import find_scale
from quantcli.sources.packed.scaled import (
    E4M3,
    INT8,
    SCALE_DTYPES,
    ScaledWeight,
    build_scaled,
    fit_scale,
)
from quantcli.sources.packed.schemes import Scheme, read_schemes
from quantcli.sources.packed.settings import Settings
from quantcli.sources.packed.weight import (
    FLOATS,
    Floats,
    PackedWeight,
    RowWeight,
    check_group,
    describe,
    expect_shape,
    load,
    scale_groups,
    show,
    take_part,
)
from quantcli.sources.shards import Shards
from quantcli.types import TensorInfo

_PACKED = "_packed"
_BESIDE = ("_scale", "_zero_point")
"""Endings of what lies beside codes and may have their dtypes."""
_ALIGNED = 32
"""Outputs whose zero points fill whole words, whatever the bits."""
_NAME = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class _Matrix:
    name: str
    bits: int
    columns: int
    zeros: str | None
    order: str | None


def find_compressed_tensors(shards: Shards, settings: Settings) -> dict[str, PackedWeight]:
    """Every quantized weight; SourceError names the first part that is wrong."""
    schemes = read_schemes(settings)
    found: dict[str, PackedWeight] = {}
    for name, info in shards.tensors.items():
        weight = name.removesuffix(_PACKED)
        is_codes = info.dtype in (E4M3, INT8) and not name.endswith(_BESIDE)
        if weight == name and not is_codes:
            continue
        module = weight.removesuffix(".weight")
        scheme = schemes.find(module, info.file)
        if weight == name:
            found[weight] = _build_bytes(shards, info, scheme)
        elif scheme.kind == "float":
            if scheme.bits != 4:
                raise settings.refuse(f"packed floats of {scheme.bits} bits")
            found[weight] = build_float4(
                shards, info, weight, _NAME, scheme.group, whole=f"{weight}_global_scale",
                divides=True,
            )  # fmt: skip
        else:
            found[weight] = _build_words(shards, info, weight, scheme)
    return found


def _build_bytes(shards: Shards, codes: TensorInfo, scheme: Scheme) -> ScaledWeight:
    tensors, name = shards.tensors, codes.name
    if (scheme.kind == "float") != (codes.dtype == E4M3) or scheme.bits > 8:
        raise SourceError(
            f"{codes.file}: tensor {name!r} is {codes.dtype}, but config.json makes it "
            f"{scheme.kind} of {scheme.bits} bits"
        )
    stored = find_scale(tensors, codes)
    columns = codes.shape[-1] if codes.shape else 1
    block = scheme.block
    if scheme.group:
        check_group(codes, columns, scheme.group)
        block = (1, scheme.group)
    # MXFP8's exponents are bytes.
    scale = fit_scale(codes, stored, block, (*SCALE_DTYPES, *(("U8",) if scheme.group else ())))
    zeros = f"{name}_zero_point"
    others: tuple[str, ...] = ()
    has_zeros = zeros in tensors and codes.dtype == INT8
    if has_zeros:
        expect_shape(take_part(tensors, zeros, name, (INT8,)), stored.shape, f"as {stored.name!r}")
    elif zeros in tensors:
        others = (zeros,)
    elif not scheme.symmetric:
        take_part(tensors, zeros, name, (INT8,))
    kind = None
    if codes.dtype == INT8:
        kind = describe(_NAME, scheme.bits, columns, scheme.group or columns, whole=stored)
    return build_scaled(
        tensors, codes, scale, kind=kind, zeros=zeros if has_zeros else None, others=others
    )


def _build_words(shards: Shards, words: TensorInfo, name: str, scheme: Scheme) -> RowWeight:
    tensors, bits = shards.tensors, scheme.bits
    take_part(tensors, words.name, words.name, ("I32",))
    rows, columns = _shape(shards, words, name, scheme)
    expect_shape(
        words, (rows, -(-columns * bits // 32)), f"for {bits}-bit codes of {rows}×{columns} weights"
    )
    group = scheme.group or columns
    check_group(words, columns, group)
    groups = columns // group
    where = f"for {describe('', bits, columns, group).strip()} of {words.name!r}"
    scales = take_part(tensors, f"{name}_scale", words.name, FLOATS)
    if scales.elements != 1 or groups > 1:
        expect_shape(scales, (rows, groups), where)
    parts = [words.name, f"{name}_shape", scales.name]
    zeros = f"{name}_zero_point"
    if not scheme.symmetric or zeros in tensors:
        stored = take_part(tensors, zeros, words.name, ("I32", INT8))
        if stored.dtype == INT8:
            expect_shape(stored, scales.shape, where)
        else:
            expect_shape(stored, (-(-rows * bits // 32), groups), where)
        parts.append(zeros)
    order = f"{name}_g_idx"
    is_ordered = order in tensors and _is_ordered(shards, order, words, columns, group)
    if order in tensors:
        parts.append(order)
    kind = describe(_NAME, bits, columns, group, whole=scales)
    matrix = _Matrix(
        name, bits, columns, zeros if zeros in parts else None, order if is_ordered else None
    )
    info = show(name, (rows, columns), kind, parts, tensors)
    return RowWeight(info, tuple(parts), partial(_decode_words, matrix))


def _shape(shards: Shards, words: TensorInfo, name: str, scheme: Scheme) -> tuple[int, int]:
    """Rows and columns: as stored, or, where that would cost a request, as the words allow."""
    stored = take_part(shards.tensors, f"{name}_shape", words.name, ("I64", "I32"))
    expect_shape(stored, (2,), f"of rows and columns of {words.name!r}")
    if shards.places[stored.name].file.is_remote and len(words.shape) == 2:
        widest = words.shape[1] * 32 // scheme.bits
        return words.shape[0], widest - (widest % scheme.group if scheme.group else 0)
    rows, columns = (int(extent) for extent in load(shards, stored.name)[0])
    if rows <= 0 or columns <= 0:
        raise SourceError(
            f"{stored.file}: tensor {stored.name!r} gives the shape {[rows, columns]}"
        )
    return rows, columns


def _is_ordered(shards: Shards, name: str, words: TensorInfo, columns: int, group: int) -> bool:
    """Whether groups are other than runs of columns; the library fills in -1 for none."""
    expect_shape(
        take_part(shards.tensors, name, words.name, ("I32",)), (columns,), f"of {words.name!r}"
    )
    if shards.places[name].file.is_remote:
        return False
    groups, runs = load(shards, name)[0], np.arange(columns) // group
    if (groups == -1).all():
        return False
    if not 0 <= groups.min() <= groups.max() <= runs[-1]:
        raise SourceError(
            f"{words.file}: tensor {name!r} names groups {groups.min()} to {groups.max()}, "
            f"but there are {runs[-1] + 1}"
        )
    return not np.array_equal(groups, runs)


def _decode_words(matrix: _Matrix, shards: Shards, start: int, stop: int) -> Floats:
    words = load(shards, f"{matrix.name}_packed", (start, stop))
    weights = layout.unpack_codes(words, matrix.bits, matrix.columns).astype(np.float32)
    scales = _row_values(shards, f"{matrix.name}_scale", start, stop)
    zeros = _zeros(matrix, shards, start, stop, scales.shape)
    if matrix.order is None:
        return scale_groups(weights, scales, zeros)
    order = load(shards, matrix.order)[0]
    weights -= zeros[:, order]
    weights *= scales[:, order]
    return weights


def _row_values(shards: Shards, name: str, start: int, stop: int) -> Floats:
    """Scales or zero points of rows; one number for the whole tensor stands for each of them."""
    info = shards.tensors[name]
    if info.elements == 1:
        return np.repeat(load(shards, name).astype(np.float32).reshape(1, 1), stop - start, axis=0)
    return load(shards, name, (start, stop)).astype(np.float32)


def _zeros(
    matrix: _Matrix, shards: Shards, start: int, stop: int, shape: tuple[int, ...]
) -> Floats:
    middle = 1 << (matrix.bits - 1)
    if matrix.zeros is None:
        return np.full(shape, middle, np.float32)
    stored = shards.tensors[matrix.zeros]
    if stored.dtype == INT8:
        return _row_values(shards, matrix.zeros, start, stop) + np.float32(middle)
    first = start - start % _ALIGNED
    last = min(stored.shape[0], -(-stop // _ALIGNED) * matrix.bits)
    words = load(shards, matrix.zeros, (first // 32 * matrix.bits, last))
    return layout.unpack_zeros(words, matrix.bits, stop - first)[start - first :].astype(np.float32)
