"""Quantized weights as stored: the parts that every storage has, their checks, bounded reads.

A packed weight is shown under its own name (``X.weight``) with the shape it stands for, although
the file holds codes and scales under other names. Rows come as float32, strip by strip, so that
the codes of a large matrix are never widened all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.layouts.stored_codes import StoredCodes
from quantcli.types import PackedType, TensorInfo

Floats = NDArray[np.float32]
Span = tuple[int, int]

_STRIP = 1 << 20
"""Weights decoded at once; codes are widened to several times their stored size on the way."""

_LOOKUPS = 1 << 16
"""Bytes looked up at once: NumPy widens indices eightfold."""

FLOATS = ("F64", "F32", "F16", "BF16")


class StoredTensors(Protocol):
    """The tensors of a checkpoint as they are stored, and reads of parts of them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by name."""

    def load(
        self,
        name: str,
        rows: Span | None = None,
        columns: Span | None = None,
        *,
        width: int | None = None,
    ) -> NDArray[Any]:
        """Part of a tensor as a matrix of its own dtype, leading axes flattened.

        ``width`` is a row's length where that is not the last axis. E4M3 comes as bytes.
        """

    def load_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes ``start:stop`` of a tensor, whatever its dtype."""

    def is_remote(self, name: str) -> bool:
        """Whether a read costs a request."""


class PackedWeight(Protocol):
    """A weight that several stored tensors make up."""

    @property
    def info(self) -> TensorInfo:
        """The weight as it is shown: its name, shape, type, and the bytes of all its parts."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The stored tensors it is made of, which do not show."""

    def read(self, source: StoredTensors, rows: Span, columns: Span) -> Floats:
        """A rectangle of the weight, leading axes flattened, in float32."""


@runtime_checkable
class BlockedWeight(PackedWeight, Protocol):
    """A packed stack whose columns are rows of the block format ``blocks``, code by code."""

    @property
    def blocks(self) -> str:
        """The name of the block format."""

    def read_blocks(self, source: StoredTensors, start: int, stop: int) -> NDArray[np.uint8]:
        """Packed rows of some columns, those of all matrices counted through."""


@dataclass(frozen=True, slots=True)
class RowWeight:
    """A packed matrix that is decoded by whole rows; ``decode`` gets tensors and a row range.

    ``coded`` are its codes, where they lie on a grid.
    """

    info: TensorInfo
    parts: tuple[str, ...]
    decode: Callable[[StoredTensors, int, int], Floats]
    coded: StoredCodes | None = None

    def read(self, source: StoredTensors, rows: Span, columns: Span) -> Floats:
        """A rectangle, its rows decoded in strips."""
        width = self.info.shape[-1]
        step = max(1, _STRIP // max(1, width))
        if columns == (0, width) and 0 < rows[1] - rows[0] <= step:
            return self.decode(source, *rows)
        block = np.empty((rows[1] - rows[0], columns[1] - columns[0]), np.float32)
        for start in range(rows[0], rows[1], step) if block.size else ():
            stop = min(start + step, rows[1])
            strip = self.decode(source, start, stop)
            block[start - rows[0] : stop - rows[0]] = strip[:, slice(*columns)]
        return block


def show(
    name: str, shape: tuple[int, ...], kind: PackedType, parts: Iterable[str], tensors: Any
) -> TensorInfo:
    """The line under which a packed weight is listed; ``parts`` are names in ``tensors``."""
    stored = [tensors[part] for part in parts]
    nbytes = sum(info.nbytes for info in stored)
    return TensorInfo(name, shape, kind, nbytes, stored[0].file)


def describe(
    method: str, bits: int, columns: int, group: int, *, whole: TensorInfo | None = None
) -> PackedType:
    """The type of integers: "GPTQ int4, groups of 128".

    ``whole`` are scales that may be one for the tensor.
    """
    if whole is not None and not whole.shape[1:] and whole.elements == 1:
        return PackedType(f"{method} int{bits}, per tensor")
    span = "per row" if group == columns else f"groups of {group}"
    return PackedType(f"{method} int{bits}, {span}", bits, group)


def look_up_pairs(stored: NDArray[np.uint8], table: Floats, *, high_first: bool) -> Floats:
    """What the two four-bit codes of each byte stand for in ``table`` (16), flattened."""
    byte = np.arange(256)
    halves = (table[byte >> 4], table[byte & 15])
    pairs = np.stack(halves if high_first else halves[::-1], axis=1)
    flat = stored.reshape(-1)
    values = np.empty((len(flat), 2), np.float32)
    for start in range(0, len(flat), _LOOKUPS):
        part = slice(start, start + _LOOKUPS)
        np.take(pairs, flat[part], axis=0, out=values[part], mode="clip")
    return values.reshape(-1)


def scale_groups(weights: Floats, scales: Floats, zeros: Floats | None = None) -> Floats:
    """``(weights - zeros) * scales`` in place; scales and zeros are (rows, groups of columns)."""
    rows, groups = scales.shape
    grouped = weights.reshape(rows, groups, -1)
    if zeros is not None:
        grouped -= zeros[:, :, None]
    grouped *= scales[:, :, None]
    return weights


def take_part(
    tensors: Mapping[str, TensorInfo], name: str, owner: str, dtypes: tuple[str, ...]
) -> TensorInfo:
    """The stored tensor ``name`` that ``owner`` needs; SourceError when it is not there.

    SourceError too when its dtype is none of ``dtypes``.
    """
    if name not in tensors:
        raise SourceError(
            f"{tensors[owner].file}: tensor {owner!r} holds codes, but there is no {name!r}, "
            "without which they mean nothing",
            hint="the checkpoint is incomplete, or its quantization_config is another's",
        )
    info = tensors[name]
    if info.dtype not in dtypes:
        raise SourceError(
            f"{info.file}: tensor {name!r} has dtype {info.dtype}; with {owner!r} it must be "
            f"{' or '.join(dtypes)}"
        )
    return info


def expect_shape(info: TensorInfo, shape: tuple[int, ...], why: str) -> None:
    """SourceError unless the stored tensor has this shape; ``why`` ends the sentence."""
    if info.shape != shape:
        raise SourceError(
            f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}, expected "
            f"{list(shape)} {why}"
        )


def check_group(info: TensorInfo, columns: int, group: int) -> None:
    """SourceError unless groups of ``group`` divide a row of ``columns`` weights."""
    if group <= 0 or columns % group:
        raise SourceError(
            f"{info.file}: tensor {info.name!r} has rows of {columns} weights, which groups of "
            f"{group} do not divide"
        )
