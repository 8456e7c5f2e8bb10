"""From a family's rules and the stored tensors to output tensors; refuses whatever is left over.

Every stored tensor is used by a rule or stands on the family's list of ignored ones, and every
rule finds its tensor, in each layer for which it holds, in the shape that config.json promises: a
checkpoint that another version of the model's code wrote is refused by a name, never converted in
part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace

from quantcli.archs.rules import Dims, KeyRule, Rule, Share, Values, at, size, sizes
from quantcli.errors import ArchitectureError, MismatchError
from quantcli.pieces import Order, Piece
from quantcli.registry import near
from quantcli.types import OutputTensor, TensorInfo

LayerDims = Callable[[int | None], Dims]
"""The named sizes in a layer; outside of them for None."""


def assemble(
    model: str,
    rules: tuple[Rule, ...],
    dims: LayerDims,
    values: Values,
    stored: Mapping[str, TensorInfo],
    *,
    keyed: tuple[KeyRule, ...],
    renames: tuple[tuple[str, str], ...],
    ignored: tuple[str, ...],
) -> list[OutputTensor]:
    """The output tensors of ``rules`` over ``stored``, and ``values``, in llama.cpp's order.

    ``model`` is the class name for messages; the rest are `Architecture`'s.
    """
    shelf = _Shelf(model, rename(renames, stored))
    found = [OutputTensor(name, array.shape, "F32", values=array) for name, array in values.items()]
    layers = dims(None)["layers"]
    for rule in rules:
        for layer in rule.places(layers):
            if not rule.optional or shelf.holds(at(rule.source, layer)):
                found.append(_build(rule, layer, dims(layer), shelf))
    for key in keyed:
        for layer in range(layers):
            shelf.take_number(at(key.source, layer))
    shelf.refuse_rest(ignored)
    return sorted(found, key=_llama_order)


def stored_shapes(
    rules: tuple[Rule, ...], dims: LayerDims, keyed: tuple[KeyRule, ...], written: Container[str]
) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint from which ``rules`` make the GGUF tensors ``written``.

    Shapes by the rules' own spelling of the names, experts apart as checkpoints publish them.
    """
    found: dict[str, tuple[int, ...]] = {}
    layers = dims(None)["layers"]
    for rule in rules:
        for layer in rule.places(layers):
            if rule.optional and at(rule.name, layer) not in written:
                continue
            shape = rule.stored_shape(dims(layer))
            if "{e}" not in rule.source:
                found[at(rule.source, layer)] = shape
                continue
            for expert in range(shape[0]):
                found[at(rule.source, layer, expert)] = shape[1:]
    found |= {at(key.source, layer): key.shape for key in keyed for layer in range(layers)}
    return found


@dataclass
class _Shelf:
    """Stored tensors under the rules' spelling, and which of them have been taken."""

    model: str
    tensors: Mapping[str, TensorInfo]
    taken: set[str] = field(default_factory=set)

    def holds(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        if name not in self.tensors:
            folder = next((info.file.parent for info in self.tensors.values()), None)
            guesses = near(name, sorted(self.tensors.keys() - self.taken), most=1)
            raise MismatchError(
                f"tensor {name} is missing from {folder or 'the checkpoint'}, "
                f"and {self.model} needs it",
                hint=f"it holds {guesses[0]}" if guesses else None,
            )
        info = self.tensors[name]
        if info.shape != shape:
            raise MismatchError(
                f"tensor {info.name} of {info.file} has shape {_show(info.shape)}, "
                f"but config.json makes it {_show(shape)}"
            )
        self.taken.add(name)
        return info

    def take_number(self, name: str) -> TensorInfo:
        """A tensor with one element, with or without an axis."""
        scalar = name in self.tensors and self.tensors[name].shape == ()
        return self.take(name, () if scalar else (1,))

    def refuse_rest(self, ignored: tuple[str, ...]) -> None:
        for name, info in self.tensors.items():
            if name not in self.taken and not any(re.fullmatch(p, name) for p in ignored):
                raise ArchitectureError(
                    f"tensor {info.name} of {info.file} is not part of {self.model}",
                    hint="the checkpoint and its config.json do not belong together, or the model "
                    f"was changed; --ignore-tensor '{re.escape(info.name)}' leaves it out",
                )


def _build(rule: Rule, layer: int | None, dims: Dims, shelf: _Shelf) -> OutputTensor:
    sources = list(_pieces(rule, layer, dims, shelf))
    dtypes = sorted({info.dtype for info, _ in sources})
    if len(dtypes) > 1:
        raise ArchitectureError(
            f"the experts of {at(rule.name, layer)} are stored as {' and '.join(dtypes)}, "
            "but one tensor has one type"
        )
    pieces = tuple(piece for _, piece in sources)
    return OutputTensor(at(rule.name, layer), sizes(rule.shape, dims), dtypes[0], pieces)


def _pieces(
    rule: Rule, layer: int | None, dims: Dims, shelf: _Shelf
) -> Iterator[tuple[TensorInfo, Piece]]:
    shape, stored = sizes(rule.shape, dims), rule.stored_shape(dims)
    share = rule.fused
    if share is not None and shelf.holds(at(share.source, layer)):
        yield from _shares(share, at(share.source, layer), shape, shelf)
        return
    if "{e}" not in rule.source:
        info = shelf.take(at(rule.source, layer), stored)
        pointwise = [part.pointwise or rule.pointwise for part in rule.parts] or [rule.pointwise]
        orders = _orders(rule, dims, shape, stored)
        for (order, start), function in zip(orders, pointwise, strict=True):
            rows = math.prod(shape[:-1]) if order is None else order.size // shape[-1]
            piece = Piece(info.name, rows, start, order, function)
            yield from ((info, part) for part in _matrices(piece, shape))
        return
    for expert in range(shape[0]):
        info = shelf.take(at(rule.source, layer, expert), stored[1:])
        yield info, Piece(info.name, shape[1])


def _shares(
    share: Share, name: str, shape: tuple[int, ...], shelf: _Shelf
) -> Iterator[tuple[TensorInfo, Piece]]:
    """A stack of experts, out of the tensor ``name`` that fuses it with others."""
    experts, each, columns = shape
    if share.transpose is None:
        turned = (experts, columns, share.of * each)
        share = replace(share, transpose=shelf.tensors[name].shape == turned)
    stacked = (columns, share.of * each) if share.transpose else (share.of * each, columns)
    info = shelf.take(name, (experts, *stacked))
    for expert in range(experts):
        yield info, _share(share, info.name, expert, each, columns)


def _orders(
    rule: Rule, dims: Dims, shape: tuple[int, ...], stored: tuple[int, ...]
) -> Iterator[tuple[Order | None, int]]:
    """Which elements follow one another, each from a stored row on."""
    if rule.transpose:
        yield Order(stored, (1, 0), stored[-1]), 0
    elif rule.rotary:
        heads = dims[rule.rotary]
        view = (heads, 2, shape[0] // heads // 2, *shape[1:])
        yield Order(view, (0, 2, 1, 3)[: len(view)], shape[-1]), 0
    elif rule.parts:
        yield from ((part.order(dims, stored), size(part.start, dims)) for part in rule.parts)
    else:
        yield None, 0


def _matrices(piece: Piece, shape: tuple[int, ...]) -> Iterator[Piece]:
    """A stack's matrices, each a piece, where they can be made apart."""
    order = piece.order
    if len(shape) < 3 or (order is not None and order.groups != shape[0]):
        yield piece
        return
    rows, stored = piece.rows // shape[0], piece.stored_rows // shape[0]
    if order is not None:
        order = replace(
            order,
            view=order.view[1:],
            axes=tuple(axis - 1 for axis in order.axes[1:]),
            cut=tuple((axis - 1, start, stop) for axis, start, stop in order.cut),
        )
    for index in range(shape[0]):
        yield replace(piece, rows=rows, start=piece.start + index * stored, order=order)


def _share(share: Share, source: str, expert: int, rows: int, columns: int) -> Piece:
    if not share.transpose and not share.interleaved:
        return Piece(source, rows, start=(expert * share.of + share.index) * rows)
    view, axis = ((rows, share.of), 1) if share.interleaved else ((share.of, rows), 0)
    cut = ((axis, share.index, share.index + 1),) if share.of > 1 else ()
    if not share.transpose:
        order = Order((*view, columns), (0, 1, 2), columns, cut)
    elif share.of == 1:
        order = Order((columns, rows), (1, 0), rows)
    else:
        shifted = ((axis + 1, share.index, share.index + 1),)
        order = Order((columns, *view), (1, 2, 0), share.of * rows, shifted)
    piece = Piece(source, rows, order=order)
    return replace(piece, start=expert * piece.stored_rows)


def rename(
    renames: tuple[tuple[str, str], ...], stored: Mapping[str, TensorInfo]
) -> Mapping[str, TensorInfo]:
    """The stored tensors under the rules' spelling of their names."""
    renamed: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ArchitectureError(
                f"{info.file} holds both {renamed[name].name} and {info.name}, "
                "which are the same tensor"
            )
        renamed[name] = info
    return renamed


def _show(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "()"


def _llama_order(tensor: OutputTensor) -> tuple[int, str]:
    """llama.cpp keeps tensors outside the layers first, then by layer, then by name."""
    block = re.match(r"blk\.(\d+)\.", tensor.name)
    return (int(block[1]) if block else -1, tensor.name)
