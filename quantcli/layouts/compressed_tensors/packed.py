"""compressed-tensors' "pack-quantized": weights of 2 to 8 bits in dense words along each row.

A matrix is ``X.weight_packed`` (int32), ``X.weight_scale``, ``X.weight_shape`` and, where it is
asymmetric, ``X.weight_zero_point``, packed along the outputs; others' have ``X.weight_g_idx`` where
groups follow an ordering by activation, which the library itself has given up since (its
``actorder`` is "weight" or nothing), so that none is written. The library stores signed codes
shifted by half their range, which makes them ours. Rows whose length does not fill the last word
are padded. Source:
``pack_to_int32`` of compressed-tensors 0.20 (before its pull request 715, three-bit codes lay
otherwise).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.integer import GridCodes, IntegerGrid, Strategy, Zero
from quantcli.layouts.base import Packing, Patch, as_stored
from quantcli.layouts.compressed_tensors.groups import (
    METHOD,
    StoredScheme,
    describe_config,
    integer_weights,
    scale_shape,
)
from quantcli.layouts.scaled import INT8
from quantcli.layouts.stored import (
    FLOATS,
    Floats,
    RowWeight,
    StoredTensors,
    check_group,
    describe,
    expect_shape,
    scale_groups,
    show,
    take_part,
)
from quantcli.layouts.stored_codes import Ranges, StoredCodes, scale_kind, span_of
from quantcli.layouts.words import WORD, Codes, pack_bits, unpack_bits, word_count
from quantcli.types import Declared, Matrix, TensorInfo

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Matrix:
    name: str
    bits: int
    columns: int
    zeros: str | None
    order: str | None


def pack_codes(codes: Codes, bits: int) -> Ints:
    """``weight_packed``: int32 (out, words) of codes (out, in)."""
    return pack_bits(codes, bits).view(np.int32)


def unpack_codes(packed: Ints, bits: int, columns: int) -> Codes:
    """Codes (out, columns) of ``weight_packed`` (out, words)."""
    return unpack_bits(packed, bits, columns)


def pack_zeros(zeros: NDArray[Any], bits: int) -> Ints:
    """``weight_zero_point``: int32 (words, groups) of zero points (out, groups)."""
    return np.ascontiguousarray(pack_bits(zeros.T, bits).T).view(np.int32)


def unpack_zeros(packed: Ints, bits: int, rows: int) -> Codes:
    """Zero points (rows, groups) of ``weight_zero_point`` (words, groups)."""
    return np.ascontiguousarray(unpack_bits(packed.T, bits, rows).T)


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    name, scale = matrix.module, scale_shape(matrix, grid)
    tensors = [
        Declared(
            f"{name}.weight_packed", "I32", (matrix.rows, word_count(matrix.columns, grid.bits))
        ),
        Declared(f"{name}.weight_scale", grid.scale_dtype, scale),
        Declared(f"{name}.weight_shape", "I64", (2,)),
    ]
    if grid.symmetric:
        return tensors
    if grid.strategy == "tensor":
        zero = Declared(f"{name}.weight_zero_point", "I8", scale)
    else:
        shape = (word_count(matrix.rows, grid.bits), *scale[1:])
        zero = Declared(f"{name}.weight_zero_point", "I32", shape)
    return [*tensors, zero]


def _place(matrix: Matrix, grid: IntegerGrid, start: int, coded: GridCodes) -> Iterator[Patch]:
    name = matrix.module
    yield Patch(f"{name}.weight_packed", pack_codes(coded.codes, grid.bits), start)
    if start == 0:
        yield Patch(f"{name}.weight_shape", np.array([[matrix.rows, matrix.columns]], np.int64))
    if grid.strategy != "tensor":
        yield Patch(f"{name}.weight_scale", as_stored(coded.scales, grid), start)
        if coded.zeros is not None:
            zeros = pack_zeros(coded.zeros, grid.bits)
            yield Patch(f"{name}.weight_zero_point", zeros, word_count(start, grid.bits))
    elif start == 0:
        yield Patch(f"{name}.weight_scale", as_stored(coded.scales, grid))
        if coded.zeros is not None:
            yield Patch(f"{name}.weight_zero_point", (coded.zeros - grid.middle).astype(np.int8))


PACKED = Packing(_declare, _place, describe_config, form="pack-quantized", weights=integer_weights)


def build_words(
    source: StoredTensors, words: TensorInfo, name: str, scheme: StoredScheme
) -> RowWeight:
    """The weight ``name`` of ``words``; SourceError names the first part that is wrong."""
    tensors, bits = source.tensors, scheme.bits
    take_part(tensors, words.name, words.name, ("I32",))
    rows, columns = _shape(source, words, name, scheme)
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
    is_ordered = order in tensors and _is_ordered(source, order, words, columns, group)
    if order in tensors:
        parts.append(order)
    kind = describe(METHOD, bits, columns, group, whole=scales)
    matrix = _Matrix(
        name, bits, columns, zeros if zeros in parts else None, order if is_ordered else None
    )
    info = show(name, (rows, columns), kind, parts, tensors)
    span: tuple[Strategy, int | None] = span_of(columns, group)
    if scales.elements == 1:
        span = ("tensor", None)
    zero: Zero = "integer" if matrix.zeros else "middle"
    grid = IntegerGrid(bits, zero, *span, scale_kind(scales.dtype), ordered=is_ordered)
    coded = StoredCodes(
        grid, partial(_codes, matrix), partial(_ranges, matrix),
        order=partial(_order, order) if is_ordered else None,
    )  # fmt: skip
    return RowWeight(info, tuple(parts), partial(_decode, matrix), coded)


def _order(name: str, source: StoredTensors) -> NDArray[np.int32]:
    """The group of each column."""
    return np.asarray(source.load(name)[0], np.int32)


def _shape(
    source: StoredTensors, words: TensorInfo, name: str, scheme: StoredScheme
) -> tuple[int, int]:
    """Rows and columns: as stored, or, where that would cost a request, as the words allow."""
    stored = take_part(source.tensors, f"{name}_shape", words.name, ("I64", "I32"))
    expect_shape(stored, (2,), f"of rows and columns of {words.name!r}")
    if source.is_remote(stored.name) and len(words.shape) == 2:
        widest = words.shape[1] * 32 // scheme.bits
        return words.shape[0], widest - (widest % scheme.group if scheme.group else 0)
    rows, columns = (int(extent) for extent in source.load(stored.name)[0])
    if rows <= 0 or columns <= 0:
        raise SourceError(
            f"{stored.file}: tensor {stored.name!r} gives the shape {[rows, columns]}"
        )
    return rows, columns


def _is_ordered(
    source: StoredTensors, name: str, words: TensorInfo, columns: int, group: int
) -> bool:
    """Whether groups are other than runs of columns; the library fills in -1 for none."""
    expect_shape(
        take_part(source.tensors, name, words.name, ("I32",)), (columns,), f"of {words.name!r}"
    )
    if source.is_remote(name):
        return False
    groups, runs = source.load(name)[0], np.arange(columns) // group
    if (groups == -1).all():
        return False
    if not 0 <= groups.min() <= groups.max() <= runs[-1]:
        raise SourceError(
            f"{words.file}: tensor {name!r} names groups {groups.min()} to {groups.max()}, "
            f"but there are {runs[-1] + 1}"
        )
    return not np.array_equal(groups, runs)


def _decode(matrix: _Matrix, source: StoredTensors, start: int, stop: int) -> Floats:
    weights = _codes(matrix, source, start, stop).astype(np.float32)
    scales = _row_values(source, f"{matrix.name}_scale", start, stop)
    zeros = _zeros(matrix, source, start, stop, scales.shape)
    if matrix.order is None:
        return scale_groups(weights, scales, zeros)
    order = source.load(matrix.order)[0]
    weights -= zeros[:, order]
    weights *= scales[:, order]
    return weights


def _codes(matrix: _Matrix, source: StoredTensors, start: int, stop: int) -> Codes:
    words = source.load(f"{matrix.name}_packed", (start, stop))
    return unpack_codes(words, matrix.bits, matrix.columns)


def _ranges(matrix: _Matrix, source: StoredTensors, start: int, stop: int) -> Ranges:
    scales = _row_values(source, f"{matrix.name}_scale", start, stop)
    if matrix.zeros is None:
        return scales, None
    return scales, _zeros(matrix, source, start, stop, scales.shape).astype(np.int32)


def _row_values(source: StoredTensors, name: str, start: int, stop: int) -> Floats:
    """Scales or zero points of rows; one number for the whole tensor stands for each of them."""
    info = source.tensors[name]
    if info.elements == 1:
        return np.repeat(source.load(name).astype(np.float32).reshape(1, 1), stop - start, axis=0)
    return source.load(name, (start, stop)).astype(np.float32)


def _zeros(
    matrix: _Matrix, source: StoredTensors, start: int, stop: int, shape: tuple[int, ...]
) -> Floats:
    middle = 1 << (matrix.bits - 1)
    if matrix.zeros is None:
        return np.full(shape, middle, np.float32)
    stored = source.tensors[matrix.zeros]
    if stored.dtype == INT8:
        return _row_values(source, matrix.zeros, start, stop) + np.float32(middle)
    first = start - start % WORD
    last = min(stored.shape[0], -(-stop // WORD) * matrix.bits)
    words = source.load(matrix.zeros, (first // 32 * matrix.bits, last))
    return unpack_zeros(words, matrix.bits, stop - first)[start - first :].astype(np.float32)
