"""Cases for `tests/native/driver.c`: every encoder and decoder, on every kind of row."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product

import gguf.quants
import numpy as np
from support import rows

from quantcli.formats import format_by_id

(
    ENCODE, DECODE, FIND_SCALE, SET_GRID, FEEDBACK, SWEEP, FEEDBACK_POINTS, SWEEP_POINTS,
    LARGEST, SMALL_FLOATS,
) = range(10)  # fmt: skip
_OPTIONS, _BUFFERS = 20, 12
_F32, _F16 = 0, 1
_SMALL = ("E4M3", "E2M1", "E2M1 with ties down")
_WIDTHS = (7, 16, 32, 128, 5000)
_TAILS = range(1, 40)
"""Lengths that leave each possible rest of an incomplete vector."""


@dataclass(frozen=True)
class Kernel:
    """A type that the driver knows: ggml's id, its block, and what there is for it."""

    type_id: int
    block: int
    nbytes: int
    encodes: bool
    decodes: bool

    @property
    def name(self) -> str:
        fmt = format_by_id(self.type_id)
        return f"type {self.type_id}" if fmt is None else fmt.name

    def shape(self, nrows: int, weights: int) -> tuple[int, int]:
        """Rows of about so many weights, in an odd number of blocks."""
        return nrows, (weights // self.block | 1) * self.block


@dataclass(frozen=True)
class Case:
    """One call of a kernel, as driver.c reads it; ``label`` is for people.

    Buffers are in the order of the kernel's arguments: those ``given``, those that are given and
    ``changed``, and the sizes of those only ``made``. One that is empty is not there.
    """

    label: str
    operation: int
    shape: tuple[int, int]
    options: tuple[int, ...]
    given: tuple[bytes, ...]
    changed: tuple[bytes, ...] = ()
    made: tuple[int, ...] = ()

    @property
    def output_bytes(self) -> int:
        """How many bytes come back."""
        return sum(map(len, self.changed)) + sum(self.made)

    def packed(self) -> bytes:
        contents = (*self.given, *self.changed)
        options = (*self.options, *[0] * (_OPTIONS - len(self.options)))
        sizes = (*map(len, contents), *self.made)
        sizes += (0,) * (_BUFFERS - len(sizes))
        head = (self.operation, *self.shape, *options, len(contents), len(self.given), *sizes)
        return struct.pack(f"<{len(head)}q", *head) + b"".join(contents)


def make(kernels: Sequence[Kernel], shapes: Sequence[tuple[int, int]]) -> list[Case]:
    """Cases for all kernels; the shapes (rows, about how many weights each) take turns."""
    grids = [case for kernel in kernels for case in _grid(kernel)]
    encoders = [case for k in kernels if k.encodes for case in _encoding(k, shapes)]
    decoders = [case for k in kernels if k.decodes for case in _decoding(k, shapes)]
    stored = [case for k in kernels if k.decodes and k.block == 1 for case in _reading(k)]
    small = [case for k in kernels if k.decodes and k.block == 1 for case in _small_floats(k)]
    return [*grids, *encoders, *decoders, *stored, *small]


def encoding(kernel: Kernel, x: np.ndarray, weights: np.ndarray | None, label: str) -> Case:
    """Encode float32 rows."""
    second = b"" if weights is None else weights.tobytes()
    size = x.size // kernel.block * kernel.nbytes
    options, given = (kernel.type_id, _F32), (x.tobytes(), second)
    return Case(label, ENCODE, x.shape, options, given, made=(size,))


def decoding(kernel: Kernel, packed: bytes) -> Case:
    """Decode blocks."""
    n = len(packed) // kernel.nbytes * kernel.block
    label = f"{kernel.name}, {n} weights decoded"
    return Case(label, DECODE, (1, n), (kernel.type_id,), (packed,), made=(4 * n,))


def _encoding(kernel: Kernel, shapes: Sequence[tuple[int, int]]) -> Iterator[Case]:
    fmt = format_by_id(kernel.type_id)
    turns = cycle(shapes)
    for kind, weighing in product(rows.KINDS, rows.IMPORTANCES):
        nrows, columns = kernel.shape(*next(turns))
        x, weights = rows.make(kind, nrows, columns), rows.importance(weighing, columns)
        if weights is None and fmt is not None:
            weights = rows.needed(fmt, columns)
        label = f"{kernel.name}, {kind}, {weighing}, {nrows} x {columns}"
        yield encoding(kernel, x, weights, label)
    for columns in _TAILS if kernel.block == 1 else ():
        x = rows.make("random", 1, columns)
        yield encoding(kernel, x, None, f"{kernel.name}, {columns} weights")


def _decoding(kernel: Kernel, shapes: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Any bytes at all, and the search for infinite scales among them."""
    rng = np.random.default_rng(11)
    counts = [nrows * weights for nrows, weights in (kernel.shape(*shape) for shape in shapes)]
    counts += _TAILS if kernel.block == 1 else ()
    offsets = [] if kernel.nbytes < 2 else [0, kernel.nbytes - 2]
    for n in counts:
        blocks = n // kernel.block
        packed = rng.bytes(blocks * kernel.nbytes)
        yield decoding(kernel, packed)
        label = f"{kernel.name}, infinite scales of {blocks} blocks"
        second, shape = np.array(offsets, np.int32).tobytes(), (blocks, len(offsets))
        yield Case(label, FIND_SCALE, shape, (kernel.type_id, 0x7C00), (packed, second))


def _reading(stored: Kernel) -> Iterator[Case]:
    """F16 from a stored dtype: one row and several at a time, and a value that stops it."""
    rng = np.random.default_rng(12)
    for nrows, columns in ((1, 1), (3, 1027), (2, 40_000)):
        small = rng.integers(0, 0x38, nrows * columns * stored.nbytes, np.uint8)
        stopping = small.copy()
        stopping[-stored.nbytes :] = 0x7F  # NaN or huge
        for values, what in ((small, "small"), (stopping, "one huge")):
            label = f"F16 of {nrows} x {columns} {stored.name}, {what}"
            shape, size = (nrows, columns), 2 * nrows * columns
            given = (values.tobytes(), b"")
            yield Case(label, ENCODE, shape, (_F16, stored.type_id), given, made=(size,))


def _grid(kernel: Kernel) -> Iterator[Case]:
    """The codebook grid of a type that has one, from gguf's tables."""
    owner = {"IQ1_M": "IQ1_S"}.get(kernel.name, kernel.name)
    table = getattr(gguf.quants, owner, None)
    if getattr(table, "grid_hex", None) is None:
        return
    table.init_grid()
    values = np.array(table.grid_map, np.float32)
    levels = np.searchsorted(values, table.grid.reshape(table.grid_shape)).astype(np.uint8)
    second = values.astype(np.int8).tobytes()
    label = f"{kernel.name}'s grid"
    yield Case(label, SET_GRID, levels.shape, (kernel.type_id,), (levels.tobytes(), second))


def _small_floats(stored: Kernel) -> Iterator[Case]:
    """Magnitudes and codes of any bits, and of rows of floats where these are stored."""
    rng = np.random.default_rng(13)
    for width, (nrows, columns) in product(_WIDTHS, ((3, 41), (2, 5003))):
        runs = nrows * -(-columns // width)
        values = [rng.bytes(nrows * columns * stored.nbytes)]
        if stored.type_id == _F32:
            values += [rows.make(kind, nrows, columns).tobytes() for kind in rows.KINDS]
        scales = (rng.standard_normal(runs) ** 3).astype(np.float32)
        scales[rng.random(runs) < 0.1] = 0
        for index, held in enumerate(values):
            label = f"{stored.name} {index}, {nrows} x {columns} in runs of {width}"
            shape, options = (nrows, columns), (stored.type_id, width)
            yield Case(f"largest, {label}", LARGEST, shape, options, (held,), made=(4 * runs,))
            for kind, name in enumerate(_SMALL):
                given = (held, scales.tobytes())
                yield Case(
                    f"{name}, {label}", SMALL_FLOATS, shape, (kind, *options), given,
                    made=(nrows * columns,),
                )  # fmt: skip
