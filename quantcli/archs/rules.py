"""The words of a family's table: one rule for one GGUF tensor, pure data.

Names, shapes in named dimensions and row orders can be read in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantcli.pieces import Order, Pointwise

Dims = Mapping[str, int]
"""Sizes by name: "hidden", "vocab", "heads" ..., as the rules' shapes refer to them."""
Values = dict[str, NDArray[np.float32]]
Size = str | int
"""A named dimension, or a number; -1 in a view is whatever remains."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a stored tensor's elements, in another order: an `Order` in named dimensions.

    ``view`` factorises the stored tensor, or some of its rows from ``start`` on; each ``cut``
    (axis, start, stop) takes a range of it, and ``axes`` reorder it, all in order where none are
    named. ``pointwise`` is applied to every value, in place of the rule's.
    """

    view: tuple[Size, ...]
    axes: tuple[int, ...] = ()
    cut: tuple[tuple[int, Size, Size], ...] = ()
    pointwise: Pointwise | None = None
    start: Size = 0

    def order(self, dims: Dims, stored: tuple[int, ...]) -> Order:
        """The order for a tensor of shape ``stored``."""
        view = sizes(self.view, dims)
        rest = math.prod(stored) // abs(math.prod(view))
        view = tuple(rest if factor == -1 else factor for factor in view)
        cut = tuple((axis, size(start, dims), size(stop, dims)) for axis, start, stop in self.cut)
        return Order(view, self.axes or tuple(range(len(view))), stored[-1], cut)


def every(index: int, of: int, rows: Size, columns: Size) -> Part:
    """The ``rows`` rows from ``index`` on that are ``of`` apart, of a matrix."""
    return Part((rows, of, columns), cut=((1, index, index + 1),))


@dataclass(frozen=True, slots=True)
class Share:
    """Where a rule's tensor lies when the checkpoint fuses several: part ``index`` of ``of``.

    ``source`` has shape (experts, of * rows, columns), or (experts, columns, of * rows) where it is
    a ``transpose``; None: where it has that shape. The parts follow one another, or their rows take
    turns where ``interleaved``.
    """

    source: str
    index: int = 0
    of: int = 1
    transpose: bool | None = False
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Feed:
    """Some outputs of a matrix as inputs of the GGUF tensor ``tensor``.

    They fall into ``groups`` of one size; ``start:stop`` of group i meet matrix i of the tensor.
    """

    tensor: str
    groups: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Outputs:
    """A `Feed` from the stored matrix ``source``, in named dimensions."""

    source: str
    groups: Size
    start: Size
    stop: Size

    def feed(self, tensor: str, dims: Dims) -> Feed:
        """The inputs of ``tensor``."""
        groups, start, stop = sizes((self.groups, self.start, self.stop), dims)
        return Feed(tensor, groups, start, stop)


@dataclass(frozen=True, slots=True)
class Rule:
    """One GGUF tensor and the stored tensor behind it; a pattern over layers and experts.

    ``{i}`` in the names is the layer; the rule holds for ``layers``, for all of them where none are
    named, and a block behind the last layer has the number after it. ``{e}`` in ``source`` is the
    expert: the experts' matrices become one tensor of shape (experts, rows, columns). ``fused`` is
    the other layout that checkpoints or transformers use for it.

    ``shape`` names dimensions, and ``stored`` those of the stored tensor where they differ.
    ``rotary`` names the count of heads whose two halves are interleaved, as ggml's pairwise
    rotation needs (GGML_ROPE_TYPE_NORMAL). ``transpose``: stored as (in, out). ``parts`` say which
    elements of the stored tensor follow one another by rows, where it is anything else; rules may
    take parts of one stored tensor. ``pointwise`` is applied to every value. An ``optional``
    tensor is written if it is there.

    What a tensor is multiplied with is what its stored matrix is, unless it is ``fed_by`` outputs
    of another one: matrix i of it by those of group i, since llama.cpp multiplies in another order.
    """

    name: str
    source: str
    shape: tuple[Size, ...]
    rotary: str | None = None
    transpose: bool = False
    pointwise: Pointwise | None = None
    fused: Share | None = None
    optional: bool = False
    layers: Collection[int] | None = None
    stored: tuple[Size, ...] | None = None
    parts: tuple[Part, ...] = ()
    fed_by: Outputs | None = None

    def places(self, layers: int) -> Iterable[int | None]:
        """The layers, of a model of so many, for which the rule holds; None: outside of them."""
        if "{i}" not in self.name:
            return (None,)
        return range(layers) if self.layers is None else self.layers

    def stored_shape(self, dims: Dims) -> tuple[int, ...]:
        """Shape of the stored tensor; of a stack, as one tensor of all experts."""
        if self.stored is not None:
            return sizes(self.stored, dims)
        shape = sizes(self.shape, dims)
        return shape[::-1] if self.transpose else shape


@dataclass(frozen=True, slots=True)
class KeyRule:
    """A float32 key-value with one number a layer, which checkpoints store as tensors.

    ``key`` may begin with "{arch}.", for the architecture's name; ``source`` is a pattern over
    layers. Each tensor has one element, in ``shape`` where transformers saves it.
    """

    key: str
    source: str
    shape: tuple[int, ...] = (1,)


def sizes(names: Iterable[Size], dims: Dims) -> tuple[int, ...]:
    """The sizes of named dimensions."""
    return tuple(size(name, dims) for name in names)


def size(name: Size, dims: Dims) -> int:
    """The size of a named dimension."""
    return name if isinstance(name, int) else dims[name]


def at(pattern: str, layer: int | None, expert: int | None = None) -> str:
    """A name in one layer, and of one expert."""
    name = pattern.replace("{i}", str(layer))
    return name if expert is None else name.replace("{e}", str(expert))
