"""The values that flow through the pipeline. Imports nothing of ours but `Piece`.

Shapes are row-major everywhere (the last axis is contiguous), as in safetensors; GGUF's reversed
dimensions are turned round where a file is read or written. "Rows" are the tensor with its
leading axes flattened: a tensor of shape (E, R, C) has E*R rows of C columns, one of shape (C,)
has one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quantcli.pieces import Piece


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of a tensor: the product of all axes but the last."""
    return math.prod(shape[:-1])


class PackedType(str):
    """The name of a quantized storage of a checkpoint, such as "GPTQ int4, groups of 128".

    Reading undoes it, so that everything else sees float32 rows. ``bits`` and ``group``, the
    columns that share a scale, are of an integer grid whose scales are of rows; 0 of any other.
    """

    __slots__ = ("bits", "group")

    bits: int
    group: int

    def __new__(cls, name: str, bits: int = 0, group: int = 0) -> PackedType:
        """The type of that name."""
        made = super().__new__(cls, name)
        made.bits, made.group = bits, group
        return made


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor, as the header of its file declares it.

    ``dtype`` is safetensors' name ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64" ...), a
    `PackedType` for a weight that several tensors make up (``nbytes`` are theirs together), or,
    in a GGUF, the block format's name ("Q8_0").
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path

    @property
    def elements(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape)


_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1,
    "F8_E4M3": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Declared:
    """A tensor to be written: name, dtype in safetensors' spelling and row-major shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its values."""
        return _BYTES[self.dtype] * math.prod(self.shape)


class TensorStore(Protocol):
    """Random access to the rows of named tensors; safe to call from several threads."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by name."""

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop`` as a new contiguous 2-D array.

        The dtype is float64, float32, float16 or ml_dtypes' bfloat16 as stored; FP8 with its
        scales and packed types come as float32; block formats come as uint8 of shape (rows,
        bytes per row).
        """

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Columns ``start:stop`` of a float matrix, transposed: shape (stop-start, rows).

        Of a stack they are those of one of its matrices, with the columns of all counted through.
        """

    def close(self) -> None:
        """Release the files."""


@runtime_checkable
class BlockStore(Protocol):
    """A `TensorStore` some of whose stacks are stored in GGUF's blocks, by columns."""

    @property
    def blocks(self) -> Mapping[str, str]:
        """The block format of each such stack by its name."""

    def read_blocks(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Packed rows of the columns ``start:stop``, those of all matrices counted through."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor under its GGUF name: pieces of stored tensors stacked by rows, or fixed values.

    ``dtype`` is the stored dtype ("BF16" ...), or "F32" when ``values`` (float32) are given.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...] = ()
    values: NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        """Rows, with the leading axes flattened."""
        return row_count(self.shape)

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def matrices(self) -> int:
        """Matrices: the experts of a stack, else one."""
        return self.shape[-3] if len(self.shape) > 2 else 1

    @property
    def elements(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Matrix:
    """The weight of one linear layer: where it is stored, and what a model folder calls it.

    The rows ``first : first+rows`` of the stored tensor ``source`` in its own order, or columns as
    rows where ``transpose``, those of a stack's matrices counted through and each ``step``-th of
    them from ``first`` on; ``turned`` is the piece that moves its columns to where ``tensor`` has
    them, if they move. ``tensor`` is the GGUF tensor that holds the same weights, as matrix
    ``index`` of its ``of``. In the output the matrix is ``module``'s weight by itself, or number
    ``slot`` of a stack of ``stack``.
    """

    module: str
    source: str
    rows: int
    columns: int
    tensor: str
    first: int = 0
    index: int = 0
    of: int = 1
    stack: int = 0
    slot: int = 0
    transpose: bool = False
    turned: Piece | None = None
    step: int = 1

    @property
    def elements(self) -> int:
        """How many weights it holds."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class MetaValue:
    """A GGUF key-value's typed value.

    ``kind`` is one of u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 bool str, or an array of these in
    brackets: "[str]", "[i32]". Strings may be ``bytes`` where a token is not valid UTF-8.
    """

    kind: str
    value: Any


def u32(value: int) -> MetaValue:
    """An unsigned 32-bit integer."""
    return MetaValue("u32", int(value))


def f32(value: float) -> MetaValue:
    """A 32-bit float."""
    return MetaValue("f32", float(value))


def boolean(value: bool) -> MetaValue:
    """A truth value."""
    return MetaValue("bool", bool(value))


def text(value: str) -> MetaValue:
    """A UTF-8 string."""
    return MetaValue("str", value)


def array(kind: str, values: Any) -> MetaValue:
    """An array of ``kind``."""
    return MetaValue(f"[{kind}]", values)


@dataclass(frozen=True, slots=True)
class Event:
    """Base of what the core reports while it works."""

    @property
    def details(self) -> tuple[str, ...]:
        """Sentences for who asks for more."""
        return ()


@dataclass(frozen=True, slots=True)
class Note(Event):
    """A sentence for the user; ``level`` is "info" or "warning".

    ``refused_by`` names a reader that does not take the result, or misreads it.
    """

    message: str
    level: str = "info"
    refused_by: str = ""


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """Work done so far of a total, and what is being worked on: a tensor, a layer, a window.

    ``unit`` is what is counted: "bytes" of the source, or a plural such as "groups", "steps".
    """

    done: int
    total: int
    what: str
    unit: str = "bytes"
