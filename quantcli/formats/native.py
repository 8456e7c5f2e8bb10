"""The fast path: the same bytes as the NumPy references, from the C kernels.

Rows are taken in their stored dtype (float64, float32, float16, bfloat16 or float8_e4m3fn) and
converted inside the kernels, a few rows at a time. The GIL is dropped, so slabs may be encoded by
several threads. What llama.cpp would write as an infinite scale is refused here. A format without
a kernel (a plug-in's) goes through its reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli import _native
from quantcli.errors import PlanError, WeightError
from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.grids import install_grid

_STORED = {"float32": 0, "float16": 1, "float64": 28, "bfloat16": 30, "float8_e4m3fn": 63}
"""NumPy's name of a stored dtype, and the type id by which the kernels know it."""
_SUPER = 256
_REACH = np.float32(1 << 28)
"""No block with float16 scales holds this: 65504 * 128 * 32, Q6_K's largest weight, is less."""


class UnencodableError(WeightError):
    """A weight that a block format cannot hold; ``row`` and ``column`` count within the rows."""

    def __init__(self, row: int, column: int, value: float, reason: str) -> None:
        super().__init__(f"the weight {value!r} at row {row}, column {column} {reason}")
        self.row = row
        self.column = column
        self.value = value
        self.reason = reason


def kernel_id(fmt: BlockFormat) -> int | None:
    """The id under which this build's kernels know the format; None where there are none."""
    if fmt.type_id is None:
        return None
    try:
        complete = _native.has_encoder(fmt.type_id) and _native.has_decoder(fmt.type_id)
    except (ValueError, OverflowError):
        return None
    return fmt.type_id if complete else None


def prepare(fmt: BlockFormat) -> None:
    """Give the kernels what the format needs; `encode` and `decode` do so by themselves."""
    kernel = kernel_id(fmt)
    if kernel is not None and not _native.is_ready(kernel):
        install_grid(fmt.name, kernel)


def encode(
    fmt: BlockFormat, rows: NDArray[Any], weights: Floats | None = None, *, out: Bytes | None = None
) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes), of ``rows`` of shape (n, columns).

    ``weights`` is one importance per column, float32. ``out`` receives the result when given; else
    rows that are stored in the format already come back uncopied, once they are checked.
    UnencodableError names the first weight that is not finite in float32, or the largest of the
    first block whose scale overflows.
    """
    stored = _stored_id(rows)
    count, columns = rows.shape
    if not fmt.fits(columns):
        raise ValueError(f"rows of {columns} do not divide into {fmt.name} blocks of {fmt.block}")
    if fmt.needs_importance and weights is None:
        raise ValueError(f"{fmt.name} is not encoded without importance weights")
    if out is None and stored == fmt.type_id and fmt.half_scales:
        return _checked(fmt, rows)
    packed = np.empty((count, fmt.row_bytes(columns)), np.uint8) if out is None else out
    if packed.shape != (count, fmt.row_bytes(columns)):
        raise ValueError(f"out has shape {packed.shape}, not {(count, fmt.row_bytes(columns))}")
    if not packed.flags.c_contiguous:
        raise ValueError("out is not contiguous")
    flat = packed.reshape(-1)
    kernel = kernel_id(fmt)
    if kernel is None:
        packed[:] = _by_reference(fmt, rows, weights)
        return packed
    prepare(fmt)
    bad = _native.encode(kernel, stored, _flat_bytes(rows), count, columns, flat, weights)
    if bad >= 0:
        raise _not_finite(rows, bad)
    _refuse_overflow(fmt, kernel, rows, flat)
    if fmt.block >= _SUPER:
        _refuse_lost(fmt, rows)
    return packed


def _by_reference(fmt: BlockFormat, rows: NDArray[Any], weights: Floats | None) -> Bytes:
    """The format's own ``quantize``; UnencodableError for a weight that is not finite, PlanError
    for packed rows of the wrong shape or dtype."""
    floats = to_float32(rows)
    finite = np.isfinite(floats)
    if not finite.all():
        raise _not_finite(rows, int(finite.reshape(-1).argmin()))
    packed = np.asarray(fmt.quantize(floats, weights))
    shape = (len(rows), fmt.row_bytes(rows.shape[1]))
    if packed.dtype != np.uint8 or packed.shape != shape:
        raise PlanError(
            f"quantize of the block format {fmt.name} gives {packed.dtype} of shape "
            f"{packed.shape}; uint8 of shape {shape} belongs there"
        )
    return packed


def _checked(fmt: BlockFormat, rows: NDArray[Any]) -> Bytes:
    """The bytes of F16 or BF16 rows as they are; UnencodableError names an infinity or a NaN."""
    flat = _flat_bytes(rows)
    bad = _native.first_infinite_scale(_stored_id(rows), flat, fmt.half_scales)
    if bad >= 0:
        raise _not_finite(rows, bad)
    return flat.reshape(len(rows), fmt.row_bytes(rows.shape[1]))


def _not_finite(rows: NDArray[Any], index: int) -> UnencodableError:
    row, column = divmod(index, rows.shape[1])
    value = float(rows[row, column])
    reason = "is beyond float32" if np.isfinite(value) else "is not a finite number"
    return UnencodableError(row, column, value, reason)


def decode(fmt: BlockFormat, packed: Bytes, *, out: Floats | None = None) -> Floats:
    """Weights, float32 of shape (n, columns), of packed rows of shape (n, row bytes)."""
    count, nbytes = packed.shape
    if nbytes % fmt.nbytes:
        raise ValueError(f"rows of {nbytes} bytes are not whole {fmt.name} blocks of {fmt.nbytes}")
    shape = (count, nbytes // fmt.nbytes * fmt.block)
    values = np.empty(shape, np.float32) if out is None else out
    if values.shape != shape or not values.flags.c_contiguous:
        raise ValueError(f"out is not a contiguous array of shape {shape}")
    kernel = kernel_id(fmt)
    if kernel is None:
        values[:] = fmt.dequantize(np.ascontiguousarray(packed))
        return values
    prepare(fmt)
    _native.decode(kernel, _flat_bytes(packed), values.reshape(-1))
    return values


def to_float32(rows: NDArray[Any]) -> Floats:
    """The same values as float32, from any stored float dtype; float64 is rounded."""
    values = np.empty(rows.shape, np.float32)
    _native.decode(_stored_id(rows), _flat_bytes(rows), values.reshape(-1))
    return values


def largest(rows: NDArray[Any], width: int) -> Floats:
    """The largest magnitude of each ``width`` columns, float32 (n, runs), of float rows.

    The last run has what is left. UnencodableError names the first weight that is not finite in
    float32.
    """
    count, columns = rows.shape
    found = np.empty((count, -(-columns // width)), np.float32)
    flat = found.reshape(-1)
    bad = _native.largest(_stored_id(rows), _flat_bytes(rows), count, columns, width, flat)
    if bad >= 0:
        raise _not_finite(rows, bad)
    return found


_KINDS = {("E4M3", True): 0, ("E2M1", True): 1, ("E2M1", False): 2}


def small_floats(
    rows: NDArray[Any], scales: Floats, width: int, kind: str, *, even: bool = True
) -> Bytes:
    """The nearest codes of ``rows`` over ``scales``, uint8 (n, columns).

    Each ``width`` columns have a scale, float32 of shape (n, runs); where it is 0 it is taken as 1.
    ``kind`` is "E4M3" or "E2M1"; ties go to the ``even`` code, or to the smaller magnitude, with no
    minus zero.
    """
    count, columns = rows.shape
    if scales.shape != (count, -(-columns // width)):
        raise ValueError(f"scales of shape {scales.shape} do not fit {count} x {columns} weights")
    codes = np.empty((count, columns), np.uint8)
    _native.small_floats(
        _KINDS[kind, even], _stored_id(rows), _flat_bytes(rows),
        np.ascontiguousarray(scales, np.float32).reshape(-1), count, columns, width,
        codes.reshape(-1),
    )  # fmt: skip
    return codes


_LOOKED_AT = 1 << 20
_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


def first_not_finite(rows: NDArray[Any]) -> int:
    """The flat index of the first infinity or NaN of float32, float16 or bfloat16 rows, or -1."""
    mask = _EXPONENTS[rows.dtype.name]
    # Integers compare faster than bfloat16 does, and the mask is the exponent of what is no number.
    bits = np.ascontiguousarray(rows).view(f"u{rows.itemsize}").reshape(-1)
    # Part by part: an embedding as large as the rest of a model is looked at too.
    for start in range(0, len(bits), _LOOKED_AT):
        bad = bits[start : start + _LOOKED_AT] & mask == mask
        if bad.any():
            return start + int(bad.argmax())
    return -1


def _refuse_overflow(fmt: BlockFormat, kernel: int, rows: NDArray[Any], flat: Bytes) -> None:
    """UnencodableError for the first block with a scale that llama.cpp's loader would refuse, or
    that lies below its weights."""
    offsets, columns, start = fmt.half_scales + fmt.byte_scales, rows.shape[1], 0
    while True:
        rest = flat[start * fmt.nbytes :]
        if fmt.first_infinite is not None:
            found = fmt.first_infinite(rest)
        else:
            found = _native.first_infinite_scale(kernel, rest, offsets)
        if found < 0:
            return
        row, first = divmod((start + found) * fmt.block, columns)
        values = rows[row, first : first + fmt.block].astype(np.float64)
        if fmt.half_scales and np.abs(whole := rows[row].astype(np.float64)).max() >= _REACH:
            # Its square overflowed in a sum over the row, and so did other blocks' scales.
            first, values = 0, whole
        column = int(np.abs(values).argmax())
        value = float(values[column])
        if abs(value) > fmt.holds:
            scale = "an 8-bit" if fmt.byte_scales else "a float16"
            what = f"{scale} scale of {fmt.name}" if fmt.block > 1 else fmt.name
            verb = "underflows" if fmt.byte_scales and abs(value) <= 1 else "overflows"
            raise UnencodableError(row, first + column, value, f"{verb} {what}")
        start += found + 1


def _refuse_lost(fmt: BlockFormat, rows: NDArray[Any]) -> None:
    """UnencodableError for a weight that is beyond every scale of 256 weights.

    The search's squares overflow for it, and some of llama.cpp's searches then give up and write
    zeros; smaller blocks divide their largest weight, so their scale overflows by itself.
    """
    if rows.dtype == np.float16 or not rows.size:
        return
    wide = rows if rows.dtype.name in ("float32", "bfloat16") else to_float32(rows)
    bits = np.dtype(f"i{wide.itemsize}")
    limit = int(_REACH.astype(wide.dtype).view(bits))
    # Bits of one sign are in the order of magnitudes, and integers compare faster than bfloat16.
    whole = wide.view(bits)
    if whole.max() < limit and wide.view(f"u{wide.itemsize}").max() < limit + (
        1 << 8 * wide.itemsize - 1
    ):
        return
    values = np.abs(to_float32(wide))
    row, column = divmod(int(np.argmax(values >= _REACH)), rows.shape[1])
    scale = f"overflows a float16 scale of {fmt.name}"
    raise UnencodableError(row, column, float(rows[row, column]), scale)


def _stored_id(rows: NDArray[Any]) -> int:
    stored = _STORED.get(rows.dtype.name)
    if stored is None or not rows.dtype.isnative:
        raise TypeError(f"rows of dtype {rows.dtype} are not floats that the kernels read")
    return stored


def _flat_bytes(values: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
