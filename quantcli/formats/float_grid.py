"""Grids of small floats: FP8 (E4M3) and FP4 (E2M1) codes under scales of a row, block or group.

A weight is ``value(code) * scale``. FP8 has a float scale for the matrix, each row, or each block
of 128 x 128 weights; MXFP8 and MXFP4 have a power of two (E8M0) for each 32 weights of a row; NVFP4
has an E4M3 scale for each 16 and a float32 for the whole matrix besides, by which the others are
divided. `FloatGrid.bind` sets that one, since it must be known before any row is rounded.

The rule of the references ("minmax") brings the largest magnitude under a scale to the largest
code, for powers of two to the largest code's own power. The search "mse" tries neighbouring
scales, for FP4 those that bring the largest magnitude to 4 as well as to 6, and keeps the one of
least squared error, weighted by importance if there is any. Without it, errors of NVFP4 count by
the root of the weight's square and the group's mean square: what large weights multiply is large
more often, as llama.cpp's searches assume too.

Codes are those that the formats store: a sign bit above exponent and mantissa, so that minus zero
has a code. `FloatGrid.levels` are the values in rising order, as kernels count them.

Sources: the OCP specifications of FP8 and of microscaling formats; NVIDIA's description of NVFP4
(arXiv:2509.25149); ``calculate_qparams`` and the compressors of compressed-tensors 0.20. Largest
codes of 6 and of 4: arXiv:2512.02010.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.formats import native
from quantcli.formats.base import Floats
from quantcli.formats.integer import Codes, GridCodes, Search, iterate_chunks
from quantcli.formats.native import UnencodableError

FloatKind = Literal["E4M3", "E2M1"]
FloatStrategy = Literal["group", "channel", "tensor", "block"]
ScaleKind = Literal["float", "E8M0", "E4M3"]

BLOCK = 128
"""Rows and columns that share a scale in strategy "block"."""

_LARGEST = {"E4M3": 448.0, "E2M1": 6.0}
_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_EPSILON = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""What the references store in place of a scale of zero."""
_E4M3 = ml_dtypes.float8_e4m3fn
_E4M3_STEPS = np.arange(128, dtype=np.uint8)[:-1].view(_E4M3).astype(np.float32)
"""Values of E4M3 codes 0 to 126."""
_CODES_ABOVE, _CODES_BELOW = 1, 6
"""E4M3 scales that are tried around that which brings the largest magnitude to 6: six codes are
three quarters of an octave, below which the largest magnitude would be clipped by a third."""


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """How a matrix's weights become codes of small floats.

    ``strategy`` says what shares a scale: ``group_size`` weights of a row, a row ("channel"), the
    matrix ("tensor") or 128 x 128 weights ("block", whose rows at hand begin at a multiple of 128).
    ``scales`` is how a scale is stored, and ``scale_dtype`` of "float" ones "F32", "F16" or "BF16".
    ``whole`` is NVFP4's scale of the matrix, or the one scale of a "tensor". ``mlx`` is for what
    ``mlx.core.quantize`` does otherwise than compressed-tensors: powers of two are rounded up, so
    that nothing is clipped, ties of FP4 go to the smaller magnitude, it has no minus zero, and
    scales may be zero.
    """

    kind: FloatKind
    strategy: FloatStrategy = "group"
    group_size: int | None = None
    scales: ScaleKind = "float"
    scale_dtype: str = "F32"
    whole: float | None = None
    mlx: bool = False

    zero: Literal["middle"] = "middle"
    symmetric: Literal[True] = True
    ordered: Literal[False] = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.kind == "E4M3" else 4

    @property
    def needs_whole(self) -> bool:
        """Whether `bind` is needed first."""
        return self.whole is None and (self.scales == "E4M3" or self.strategy == "tensor")

    @property
    def label(self) -> str:
        """What a table calls the grid."""
        if self.scales == "E4M3":
            return "NVFP4"
        if self.scales == "E8M0":
            return f"MXFP{self.bits}"
        return f"FP{self.bits} {self.strategy}"

    @property
    def levels(self) -> Floats:
        """The values of codes without scales, in rising order, each once."""
        return _levels(self.kind)

    @property
    def uniform(self) -> bool:
        """Whether levels are one apart: they are not."""
        return False

    @property
    def offset(self) -> float:
        """The level that stands for zero: a value is scale * (level - offset)."""
        return 0.0

    @property
    def by_rows(self) -> bool:
        """Whether a row can be rounded without the others."""
        return self.strategy in ("group", "channel")

    def groups(self, columns: int) -> int:
        """Scales for each row."""
        if self.strategy == "block":
            return -(-columns // BLOCK)
        return columns // self.group_size if self.strategy == "group" and self.group_size else 1

    def bind(self, largest: float) -> FloatGrid:
        """The grid of a matrix whose largest magnitude is ``largest``, where that matters."""
        if not self.needs_whole:
            return self
        if self.strategy == "tensor":
            scale = np.full((1, 1), np.float32(largest) / np.float32(_LARGEST[self.kind]))
            return self.with_whole(float(self.store(scale)[0, 0]) if np.isfinite(largest) else 1.0)
        with np.errstate(divide="ignore", over="ignore"):
            whole = np.float32(448.0 * 6.0) / np.float32(largest)
        return self.with_whole(float(whole) if np.isfinite(whole) and whole > 0 else 1.0)

    def with_whole(self, whole: float) -> FloatGrid:
        """The grid of a matrix with this scale for all of it."""
        return replace(self, whole=whole)

    def fit(
        self, rows: NDArray[Any], importance: Floats | None = None, search: Search = "minmax"
    ) -> tuple[Floats, None]:
        """Scales (rows, groups) of ``rows``; each row has its own, equal ones where they share it.

        Rows may be of any stored float dtype. Not for strategy "tensor". UnencodableError for a
        weight that is not finite, or too large for the scale's dtype.
        """
        tried = self._tried(self._largest(rows), search)
        scales = tried[0]
        if len(tried) > 1:
            scales = np.empty_like(scales)
            for part in iterate_chunks(*rows.shape):
                floats = native.to_float32(rows[part])
                scales[part] = self._best(floats, importance, [found[part] for found in tried])
        if not np.isfinite(scales).all():
            row = int(np.argwhere(~np.isfinite(scales))[0, 0])
            raise UnencodableError(
                row, 0, float(np.abs(rows[row]).max()), f"overflows a {self.scale_dtype} scale"
            )
        return scales, None

    def fit_tensor(
        self,
        slabs: Callable[[], Iterable[NDArray[Any]]],
        importance: Floats | None = None,
        search: Search = "minmax",
    ) -> tuple[Floats, None]:
        """The one scale (1, 1) of a matrix that is given in slabs of rows; `fit`'s errors.

        It may be larger where others share it: as `bind` has found it.
        """
        largest, first = np.float32(0), 0
        for rows in slabs():
            try:
                found = native.largest(rows, rows.shape[1])
            except UnencodableError as refused:
                raise UnencodableError(
                    first + refused.row, refused.column, refused.value, refused.reason
                ) from None
            largest = max(largest, found.max(initial=0))
            first += len(rows)
        scale = self.store(np.full((1, 1), largest / np.float32(_LARGEST[self.kind])))
        if self.whole is not None:
            scale = np.full((1, 1), self.whole, np.float32)
        if not np.isfinite(scale).all():
            raise UnencodableError(0, 0, float(largest), f"overflows a {self.scale_dtype} scale")
        return scale, None

    def quantize(
        self, rows: NDArray[Any], scales: Floats, zeros: NDArray[Any] | None = None
    ) -> Codes:
        """The nearest codes, uint8 (rows, columns), for scales of (rows or 1, groups).

        Rows may be of any stored float dtype.
        """
        count, columns = rows.shape
        scales = np.broadcast_to(scales, (count, scales.shape[1]))
        plain = self.mlx and self.kind == "E2M1"
        width = self._width(columns, scales.shape[1])
        return native.small_floats(rows, scales, width, self.kind, even=not plain)

    def dequantize(self, coded: GridCodes) -> Floats:
        """The weights, float32 (rows, columns), that the codes stand for."""
        count, columns = coded.codes.shape
        scales = np.broadcast_to(coded.scales, (count, coded.scales.shape[1]))
        return _values(self.kind)[coded.codes] * self._spread(scales, columns)

    def store(self, scales: Floats) -> Floats:
        """``scales`` as the target stores them, float32; none becomes zero."""
        if self.scales == "E8M0":
            return _power(scales)
        if self.scales == "E4M3":
            whole = np.float32(self.whole or 1.0)
            return np.asarray(self._positive_codes(scales).view(_E4M3).astype(np.float32) / whole)
        kind = _DTYPES[self.scale_dtype]
        with np.errstate(over="ignore"):
            kept = np.asarray(scales, np.float32).astype(kind)
        tiny = np.float32(_EPSILON[self.scale_dtype])
        found = np.asarray(kept, np.float32)
        return np.asarray(np.where(found == 0, tiny, found), np.float32)

    def scale_codes(self, scales: Floats) -> NDArray[np.uint8]:
        """The bytes that store ``scales`` of E8M0 or E4M3."""
        if self.scales == "E8M0":
            return np.asarray(np.frexp(scales)[1] + 126, np.uint8)
        scaled = np.minimum(scales * np.float32(self.whole or 1.0), np.float32(448))
        return np.asarray(scaled, np.float32).astype(_E4M3).view(np.uint8)

    def _positive_codes(self, scales: Floats) -> NDArray[np.uint8]:
        """`scale_codes` of E4M3 as they are chosen for weights."""
        codes = self.scale_codes(scales)
        if self.mlx:
            return codes
        # The reference takes 2**-3 where a scale rounds to zero; every weight there is zero then.
        return np.asarray(np.where(codes == 0, np.uint8(0x20), codes), np.uint8)

    def to_codes(self, ranks: Codes) -> Codes:
        """The codes of places in ``levels``."""
        return _rank_codes(self.kind)[ranks]

    def to_ranks(self, codes: Codes) -> Codes:
        """Places in ``levels``."""
        return _code_ranks(self.kind)[codes]

    def _tried(self, largest: Floats, search: Search) -> list[Floats]:
        """The scales among which a search chooses, the rule's own first."""
        if self.scales == "E8M0":
            usual = (_power_above if self.mlx else _power_under)(largest, self.kind)
            half, double = np.float32(0.5), np.float32(2)
            return [usual] if search == "minmax" else [usual, usual * double, usual * half]
        if self.scales == "E4M3":
            return self._neighbours(largest, search)
        return [self.store(largest / np.float32(_LARGEST[self.kind]))]

    def _neighbours(self, largest: Floats, search: Search) -> list[Floats]:
        """Scales whose codes lie around that which brings the largest magnitude to 6."""
        six = np.asarray(largest / np.float32(6), np.float32)
        six = np.asarray(six.astype(_DTYPES[self.scale_dtype]), np.float32)
        usual = self._positive_codes(six)
        if search == "minmax":
            codes = [usual]
        else:
            near = np.asarray(usual, np.int32)
            tried = range(-_CODES_ABOVE, _CODES_BELOW + 1)
            codes = [usual, *(np.clip(near + k, 1, 126).astype(np.uint8) for k in tried if k)]
        whole = np.float32(self.whole or 1.0)
        return [np.asarray(_E4M3_STEPS[code] / whole, np.float32) for code in codes]

    def _best(self, rows: Floats, importance: Floats | None, tried: list[Floats]) -> Floats:
        best = tried[0]
        columns = rows.shape[1]
        if importance is None and self.scales == "E4M3":
            importance = self._by_magnitude(rows, best.shape[1])
        least = self._errors(rows, best, importance, columns)
        for scales in tried[1:]:
            error = self._errors(rows, scales, importance, columns)
            better = error < least
            best, least = np.where(better, scales, best), np.where(better, error, least)
        return np.asarray(best, np.float32)

    def _by_magnitude(self, rows: Floats, groups: int) -> Floats:
        """The root of each weight's square and its group's mean square, (rows, columns)."""
        with np.errstate(over="ignore"):
            squares = np.square(rows).reshape(len(rows), groups, -1)
            roots = np.sqrt(squares + squares.mean(-1, keepdims=True))
        return np.asarray(roots.reshape(rows.shape), np.float32)

    def _errors(
        self, rows: Floats, scales: Floats, importance: Floats | None, columns: int
    ) -> Floats:
        codes, spread = self.quantize(rows, scales), self._spread(scales, columns)
        # The square of a weight beyond 1e19 is infinite: an error larger than any other.
        with np.errstate(over="ignore", invalid="ignore"):
            missed = _values(self.kind)[codes] * spread - rows
            missed *= missed
            if importance is not None:
                missed *= importance
            return np.asarray(missed.reshape(len(rows), scales.shape[1], -1).sum(-1), np.float32)

    def _largest(self, rows: NDArray[Any]) -> Floats:
        """The largest magnitude under each scale, (rows, groups)."""
        count, columns = rows.shape
        found = native.largest(rows, self._width(columns, self.groups(columns)))
        if self.strategy != "block" or not count:
            return found
        tall = np.maximum.reduceat(found, np.arange(0, count, BLOCK), axis=0)
        return np.asarray(np.repeat(tall, BLOCK, 0)[:count])

    def _width(self, columns: int, groups: int) -> int:
        """Columns that share one of so many scales of a row."""
        return BLOCK if self.strategy == "block" else max(1, columns // groups)

    def _spread(self, scales: Floats, columns: int) -> Floats:
        """A scale for each weight, or for each row."""
        if scales.shape[1] == 1:
            return scales
        width = self._width(columns, scales.shape[1])
        return np.asarray(np.repeat(scales, width, axis=1)[:, :columns])


@cache
def _values(kind: FloatKind) -> Floats:
    """What each code stands for; a NaN's code, which is never stored, as 0."""
    if kind == "E4M3":
        values = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)
        return np.asarray(np.nan_to_num(values), np.float32)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([magnitudes, -magnitudes])


@cache
def _levels(kind: FloatKind) -> Floats:
    return np.unique(_values(kind))


@cache
def _rank_codes(kind: FloatKind) -> Codes:
    values, half = _values(kind), len(_values(kind)) // 2
    found = [
        int(np.flatnonzero(values == level)[0]) if level >= 0
        else half + int(np.flatnonzero(values[half:] == level)[0])
        for level in _levels(kind)
    ]  # fmt: skip
    return np.array(found, np.uint8)


@cache
def _code_ranks(kind: FloatKind) -> Codes:
    return np.searchsorted(_levels(kind), _values(kind)).astype(np.uint8)


def _power_under(largest: Floats, kind: FloatKind) -> Floats:
    """The reference's power of two: the largest magnitude's, rounded up where its mantissa is
    within half a step of the element's below the next, over the largest code's own."""
    bits = np.asarray(largest, np.float32).view(np.uint32)
    # An FP8 element is rounded with the mantissa of FP4, as the references do.
    rounded = bits + np.uint32(1 << (23 - 1 - 1))
    exponent = (rounded >> np.uint32(23)).astype(np.int32) - 127
    exponent -= 2 if kind == "E2M1" else 8
    return np.asarray(np.ldexp(np.float32(1), np.clip(exponent, -127, 127)), np.float32)


def _power_above(largest: Floats, kind: FloatKind) -> Floats:
    """The least power of two under which no magnitude is beyond the largest code."""
    mantissa, exponent = np.frexp(np.asarray(largest / np.float32(_LARGEST[kind]), np.float32))
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    power = np.ldexp(np.float32(1), np.clip(exponent, -127, 127))
    return np.asarray(np.where(largest == 0, 1, power), np.float32)


def _power(scales: Floats) -> Floats:
    """The nearest power of two."""
    exponent = np.clip(np.rint(np.log2(np.maximum(scales, np.float32(2**-126)))), -126, 127)
    return np.asarray(np.ldexp(np.float32(1), exponent.astype(np.int32)), np.float32)
