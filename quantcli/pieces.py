"""What an output tensor is made of: rows of a stored tensor in another order, and the way back.

A `Piece` says once how stored elements become output elements, and is read in both directions:
`Piece.gather` makes output rows, `Piece.scatter` puts output rows back where they are stored. Both
take NumPy arrays and torch tensors alike: either way is one strided view of the stored elements,
read or written. `Piece.source_rows` and `Piece.group` say which rows a slab needs.

An `Order` for stored tensors of these shapes:

==========================================  ======================  ==========  ===============
what                                        view                    axes        cut
==========================================  ======================  ==========  ===============
each head's two halves interleaved          (heads, 2, d/2, in)     0, 2, 1, 3
a matrix stored as (in, out)                (in, out)               1, 0
k of a fused (heads * 3 * d, in)            (heads, 3, d, in)       0, 1, 2, 3  axis 1, 1 to 2
every second row                            (rows, 2, in)           0, 1, 2     axis 1, 0 to 1
each head's first k rows, transposed, of    (heads, k + v, rank)    0, 2, 1     axis 1, 0 to k
(heads * (k + v), rank)
a stack (experts, in, out), each            (experts, in, out)      0, 2, 1
transposed
==========================================  ======================  ==========  ===============
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_LARGEST = float(np.finfo(np.float32).max)
GATHER_SPREAD = 4
"""Scattered rows are read as one span when it is at most this many times the rows wanted."""


class Pointwise(Protocol):
    """A function of single values and its inverse, for float32 arrays and torch tensors."""

    def apply(self, values: Any) -> Any:
        """Output values of stored ones."""

    def undo(self, values: Any) -> Any:
        """Stored values of output ones."""


@dataclass(frozen=True, slots=True)
class Add:
    """Adds ``constant``; 1 for a norm that transformers multiplies by 1 + weight."""

    constant: float

    def apply(self, values: Any) -> Any:
        """Values plus the constant."""
        return values + self.constant

    def undo(self, values: Any) -> Any:
        """Values less the constant."""
        return values - self.constant


@dataclass(frozen=True, slots=True)
class Multiply:
    """Multiplies by ``factor``, not 0: a multiplier of the model that GGUF has no key-value for.

    Of the stored values that give an output the shortest is found again, as `NegativeExp` does.
    """

    factor: float

    def apply(self, values: Any) -> Any:
        """Values times the factor."""
        if isinstance(values, np.ndarray):
            return (values.astype(np.float64) * self.factor).astype(np.float32)
        return (values.double() * self.factor).to(values.dtype)

    def undo(self, values: Any) -> Any:
        """Values over the factor."""
        if isinstance(values, np.ndarray):
            return _shortest(self, values, values.astype(np.float64) / self.factor)
        return (values.double() / self.factor).to(values.dtype)


@dataclass(frozen=True, slots=True)
class NegativeExp:
    """-exp(x): a state-space layer's decay, which checkpoints store as its logarithm.

    Computed in float64, so that the rounded result is the same on every machine.
    """

    def apply(self, values: Any) -> Any:
        """-exp of stored values."""
        if isinstance(values, np.ndarray):
            return -np.exp(values.astype(np.float64)).astype(np.float32)
        return -values.double().exp().to(values.dtype)

    def undo(self, values: Any) -> Any:
        """Logarithms of negated output values.

        Of those that give the same output the one with the fewest digits of bfloat16, float16 and
        float32, since that is what was stored.
        """
        if isinstance(values, np.ndarray):
            return _shortest(self, values, np.log(-values.astype(np.float64)))
        return (-values.double()).log().to(values.dtype)


@dataclass(frozen=True, slots=True)
class Softplus:
    """log(1 + exp(x)): a scale that must stay above zero.

    Computed in float64, so that the rounded result is the same on every machine.
    """

    def apply(self, values: Any) -> Any:
        """log(1 + exp(x)) of stored values."""
        if isinstance(values, np.ndarray):
            return np.logaddexp(0.0, values.astype(np.float64)).astype(np.float32)
        wide = values.double()
        return wide.exp().log1p().where(wide < 30, wide).to(values.dtype)

    def undo(self, values: Any) -> Any:
        """log(exp(x) - 1) of output values."""
        if isinstance(values, np.ndarray):
            wide = values.astype(np.float64)
            return (wide + np.log(-np.expm1(-wide))).astype(np.float32)
        wide = values.double()
        return (wide + (-(-wide).expm1()).log()).to(values.dtype)


@dataclass(frozen=True, slots=True)
class Finite:
    """Infinities become the largest numbers of float32: limits that limit nothing."""

    def apply(self, values: Any) -> Any:
        """Values within float32's largest."""
        return values.clip(-_LARGEST, _LARGEST)

    def undo(self, values: Any) -> Any:
        """The largest numbers as infinities."""
        found = values.copy() if isinstance(values, np.ndarray) else values.clone()
        found[values >= _LARGEST], found[values <= -_LARGEST] = float("inf"), float("-inf")
        return found


@dataclass(frozen=True, slots=True)
class Order:
    """Which of some stored rows' elements are taken, and in which order.

    ``stored.reshape(view)[cut].transpose(axes)``, where each ``cut`` is (axis, start, stop).
    Stored rows have ``columns`` elements.
    """

    view: tuple[int, ...]
    axes: tuple[int, ...]
    columns: int
    cut: tuple[tuple[int, int, int], ...] = ()

    @property
    def keeps_rows(self) -> bool:
        """Whether each output row is a stored row, unchanged."""
        last = len(self.view) - 1
        whole = self.view[-1] == self.columns and all(axis != last for axis, _, _ in self.cut)
        return last > 0 and whole and self.axes[-1] == last

    @property
    def transposes(self) -> bool:
        """Whether it takes the columns of one whole matrix as rows."""
        return self.axes == (1, 0) and not self.cut and self.view[1] == self.columns

    @property
    def turns_columns(self) -> bool:
        """Whether each output row is a stored row with its elements in another order."""
        inner = math.prod(self.view[1:])
        return self.axes[0] == 0 and not self.cut and inner == self.columns and not self.keeps_rows

    @property
    def groups(self) -> int:
        """The first axis, where output rows follow it as stored rows do; else 1."""
        return self.view[0] if self.axes[0] == 0 and all(a for a, _, _ in self.cut) else 1

    @property
    def size(self) -> int:
        """How many elements it takes."""
        cut = {axis: stop - start for axis, start, stop in self.cut}
        return math.prod(cut.get(axis, size) for axis, size in enumerate(self.view))

    def strided(self, stored: Any) -> Any:
        """The elements of ``stored`` in the output's order, over the same memory.

        ``stored`` is contiguous and holds all rows, or those of some of the `groups`.
        """
        found = stored.reshape((-1 if self.groups > 1 else self.view[0], *self.view[1:]))
        ranges = {axis: slice(start, stop) for axis, start, stop in self.cut}
        found = found[tuple(ranges.get(axis, slice(None)) for axis in range(len(self.view)))]
        turned = found.transpose if isinstance(found, np.ndarray) else found.permute
        return turned(self.axes)


@dataclass(frozen=True, slots=True)
class Piece:
    """``rows`` rows of an output tensor, made of the rows of ``source`` from ``start`` on.

    Without an ``order`` they are the stored rows ``start : start+rows`` (of a tensor that is only
    reshaped, rows of the new shape). ``pointwise`` is applied to each value in float32. A tensor
    with one axis is a single row.
    """

    source: str
    rows: int
    start: int = 0
    order: Order | None = None
    pointwise: Pointwise | None = None

    @property
    def keeps_rows(self) -> bool:
        """Whether each output row is a stored row, if in another place and pointwise changed."""
        return self.order is None or self.order.keeps_rows

    @property
    def transposes(self) -> bool:
        """Whether its rows are the columns of one whole stored matrix."""
        return self.order is not None and self.order.transposes

    @property
    def turns_columns(self) -> bool:
        """Whether each row is a stored row, in its place, whose elements `turned_columns` moves."""
        return self.order is not None and self.order.turns_columns

    @property
    def turned_columns(self) -> NDArray[np.int64]:
        """The stored column behind each column; ValueError unless it `turns_columns`."""
        if self.order is None or not self.turns_columns:
            raise ValueError(f"{self.source} keeps its columns")
        return _turned_columns(self.order)

    @property
    def makes_outputs(self) -> bool:
        """Whether each row makes one output of the stored matrix: `source_rows` says which."""
        return self.keeps_rows or self.transposes or self.turns_columns

    @property
    def passes_gradients(self) -> bool:
        """Whether `gather_gradient` holds for it: values are stored but for a constant."""
        return isinstance(self.pointwise, Add | None)

    @property
    def stored_rows(self) -> int:
        """How many stored rows, from ``start`` on, it is made of."""
        if self.order is None:
            return self.rows
        return math.prod(self.order.view) // self.order.columns

    @property
    def group(self) -> tuple[int, int]:
        """Output rows and stored rows of the smallest parts that can be made apart."""
        groups = 1 if self.order is None else self.order.groups
        if self.rows % groups or self.stored_rows % groups:
            groups = 1
        return self.rows // groups, self.stored_rows // groups

    def source_columns(self) -> NDArray[np.int64] | None:
        """The stored column that each row is, where they are columns of one whole matrix.

        None where they are anything else. Columns of a stack's matrices are counted through.
        """
        order = self.order
        if order is None or self.pointwise is not None:
            return None
        found = _column_order(order)
        if found is None or self.start % self.stored_rows:
            return None
        return self.start // self.stored_rows * order.columns + found

    def source_rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Stored row numbers behind rows ``start:stop``, in order; columns where it transposes.

        ValueError where a row is made of parts of stored rows.
        """
        if self.order is None or self.transposes or self.turns_columns:
            return np.arange(self.start + start, self.start + stop, dtype=np.int64)
        return np.asarray(self.start + _row_order(self.order)[start:stop], dtype=np.int64)

    def output_rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """The row that each of the stored rows ``start:stop`` became, -1 where it is left out.

        Both are counted within the piece. ValueError as for `source_rows`.
        """
        if self.order is None or self.turns_columns:
            return np.arange(start, stop, dtype=np.int64)
        return _inverse_row_order(self.order)[start:stop]

    def origin(self, row: int, column: int) -> tuple[int, int]:
        """The stored row and column behind an element of the piece."""
        if self.order is None:
            return self.start + row, column
        if self.transposes:
            return self.start + column, row
        made, stored = self.group
        numbers = np.arange(stored * self.order.columns).reshape(stored, -1)
        found = int(self.arrange(numbers)[row % made, column])
        first = self.start + row // made * stored
        return first + found // self.order.columns, found % self.order.columns

    def gather(self, stored: Any) -> Any:
        """The piece's rows, out of the whole stored tensor."""
        return self.apply(self.arrange(self._block(stored)))

    def scatter(self, stored: Any, rows: Any) -> None:
        """Put the piece's rows back into the whole ``stored`` tensor, which is contiguous."""
        self.put(self._block(stored), self.undo(rows))

    def gather_gradient(self, gradient: Any) -> Any:
        """The gradient by the piece's rows, out of the gradient by the whole stored tensor.

        ValueError unless it `passes_gradients`.
        """
        if not self.passes_gradients:
            raise ValueError(f"{self.source} is stored through {self.pointwise}")
        return self.arrange(self._block(gradient))

    def arrange(self, block: Any) -> Any:
        """Rows before ``pointwise``, out of the stored rows ``block`` of one or more groups."""
        if self.order is None:
            return block
        made, stored = self.group
        return self.order.strided(block).reshape(made * (len(block) // stored), -1)

    def put(self, block: Any, rows: Any) -> None:
        """Write ``rows``, as `arrange` gives them, back into ``block``."""
        target = block if self.order is None else self.order.strided(block)
        target[...] = rows.reshape(target.shape)

    def apply(self, rows: Any) -> Any:
        """``pointwise`` of stored values, an array's in float32."""
        return rows if self.pointwise is None else self.pointwise.apply(_floats(rows))

    def undo(self, rows: Any) -> Any:
        """The stored values of `apply`'s."""
        return rows if self.pointwise is None else self.pointwise.undo(_floats(rows))

    def _block(self, stored: Any) -> Any:
        return stored.reshape(-1, stored.shape[-1])[self.start : self.start + self.stored_rows]


def read_scattered(
    read: Callable[[int, int], NDArray[Any]], wanted: NDArray[np.int64]
) -> NDArray[Any]:
    """The rows ``wanted``, in that order, of what ``read(start, stop)`` gives consecutive ones."""
    low, high = int(wanted.min()), int(wanted.max()) + 1
    if high - low <= GATHER_SPREAD * len(wanted):
        return np.ascontiguousarray(read(low, high)[wanted - low])
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
    return np.concatenate([read(int(run[0]), int(run[-1]) + 1) for run in runs])


@lru_cache(maxsize=64)
def _row_order(order: Order) -> NDArray[np.int64]:
    if not order.keeps_rows:
        raise ValueError(f"{order} takes stored rows apart")
    rows = replace(order, view=order.view[:-1], axes=order.axes[:-1], columns=1)
    numbers = np.arange(math.prod(rows.view), dtype=np.int64)
    return np.asarray(rows.strided(numbers).reshape(-1))


@lru_cache(maxsize=64)
def _turned_columns(order: Order) -> NDArray[np.int64]:
    numbers = np.arange(order.columns, dtype=np.int64).reshape(order.view[1:])
    return np.asarray(numbers.transpose([axis - 1 for axis in order.axes[1:]]).reshape(-1))


@lru_cache(maxsize=64)
def _column_order(order: Order) -> NDArray[np.int64] | None:
    whole = order.axes[-1] == 0 and all(axis for axis, _, _ in order.cut)
    if not whole or math.prod(order.view[1:]) != order.columns:
        return None
    columns = replace(order, view=(1, *order.view[1:]))
    numbers = np.arange(order.columns, dtype=np.int64)
    return np.asarray(columns.strided(numbers).reshape(-1))


@lru_cache(maxsize=64)
def _inverse_row_order(order: Order) -> NDArray[np.int64]:
    places = _row_order(order)
    found = np.full(math.prod(order.view[:-1]), -1, np.int64)
    found[places] = np.arange(len(places))
    return found


def _floats(rows: Any) -> Any:
    return rows.astype(np.float32) if isinstance(rows, np.ndarray) else rows


def _shortest(
    function: Pointwise, values: NDArray[np.float32], exact: NDArray[np.float64]
) -> NDArray[np.float32]:
    """``exact`` with the digits of bfloat16 or float16, where ``function`` makes ``values`` of it.

    Elsewhere the nearest float32.
    """
    found = exact.astype(np.float32)
    mantissas, exponents = np.frexp(exact)
    for digits in (11, 8):
        rounded = np.ldexp(np.rint(np.ldexp(mantissas, digits)), exponents - digits)
        rounded = rounded.astype(np.float32)
        found = np.where(function.apply(rounded) == values, rounded, found)
    return found
