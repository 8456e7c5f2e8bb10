"""From a family's rules and the stored tensors to output tensors; refuses whatever is left over.

Every stored tensor is used by a rule or stands on the family's list of ignored ones, and every
rule finds its tensor in the shape that config.json promises: a checkpoint that another version
of the model's code wrote is refused by a name, never converted in part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

from quantcli.archs.rules import Dims, Rule, Values
from quantcli.errors import ArchitectureError
from quantcli.pieces import Order, Piece
from quantcli.registry import near
from quantcli.types import OutputTensor, TensorInfo


def assemble(
    model: str,
    rules: tuple[Rule, ...],
    dims: Dims,
    values: Values,
    stored: Mapping[str, TensorInfo],
    *,
    renames: tuple[tuple[str, str], ...],
    ignored: tuple[str, ...],
) -> list[OutputTensor]:
    """The output tensors of ``rules`` over ``stored``, and ``values``, in llama.cpp's order.

    ``model`` is the class name for messages; ``renames`` and ``ignored`` are `Architecture`'s.
    """
    shelf = _Shelf(model, _rename(renames, stored))
    found = [OutputTensor(name, array.shape, "F32", values=array) for name, array in values.items()]
    for rule in rules:
        for layer in range(dims["layers"]) if "{i}" in rule.name else (None,):
            if not rule.optional or shelf.holds(_at(rule.source, layer)):
                found.append(_build(rule, layer, dims, shelf))
    shelf.refuse_rest(ignored)
    return sorted(found, key=_llama_order)


def stored_shapes(
    rules: tuple[Rule, ...], dims: Dims, written: Container[str]
) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint from which ``rules`` make the GGUF tensors ``written``.

    Shapes by the rules' own spelling of the names, experts apart as checkpoints publish them.
    """
    found: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        shape = tuple(dims[size] for size in rule.shape)
        for layer in range(dims["layers"]) if "{i}" in rule.name else (None,):
            if rule.optional and _at(rule.name, layer) not in written:
                continue
            if "{e}" not in rule.source:
                found[_at(rule.source, layer)] = shape[::-1] if rule.transpose else shape
                continue
            for expert in range(shape[0]):
                found[_at(rule.source, layer, expert)] = shape[1:]
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
            raise ArchitectureError(
                f"tensor {name} is missing from {folder or 'the checkpoint'}, "
                f"and {self.model} needs it",
                hint=f"it holds {guesses[0]}" if guesses else None,
            )
        info = self.tensors[name]
        if info.shape != shape:
            raise ArchitectureError(
                f"tensor {info.name} of {info.file} has shape {_show(info.shape)}, "
                f"but config.json makes it {_show(shape)}"
            )
        self.taken.add(name)
        return info

    def refuse_rest(self, ignored: tuple[str, ...]) -> None:
        for name, info in self.tensors.items():
            if name not in self.taken and not any(re.fullmatch(p, name) for p in ignored):
                raise ArchitectureError(
                    f"tensor {info.name} of {info.file} is not part of {self.model}",
                    hint="the checkpoint and its config.json do not belong together, "
                    "or the model was changed",
                )


def _build(rule: Rule, layer: int | None, dims: Dims, shelf: _Shelf) -> OutputTensor:
    shape = tuple(dims[size] for size in rule.shape)
    sources = list(_pieces(rule, layer, dims, shape, shelf))
    dtypes = sorted({info.dtype for info, _ in sources})
    if len(dtypes) > 1:
        raise ArchitectureError(
            f"the experts of {_at(rule.name, layer)} are stored as {' and '.join(dtypes)}, "
            "but one tensor has one type"
        )
    return OutputTensor(
        _at(rule.name, layer), shape, dtypes[0], tuple(piece for _, piece in sources)
    )


def _pieces(
    rule: Rule, layer: int | None, dims: Dims, shape: tuple[int, ...], shelf: _Shelf
) -> Iterator[tuple[TensorInfo, Piece]]:
    rows = math.prod(shape[:-1])
    if "{e}" not in rule.source:
        info = shelf.take(_at(rule.source, layer), shape[::-1] if rule.transpose else shape)
        order = _order(rule, dims, shape)
        yield info, Piece(info.name, rows, order=order, pointwise=rule.pointwise)
        return
    experts, each, columns = shape
    share = rule.fused
    if share is not None and shelf.holds(_at(share.source, layer)):
        stride = share.of * each
        info = shelf.take(_at(share.source, layer), (experts, stride, columns))
        for expert in range(experts):
            yield info, Piece(info.name, each, start=expert * stride + share.index * each)
        return
    for expert in range(experts):
        info = shelf.take(_at(rule.source, layer, expert), (each, columns))
        yield info, Piece(info.name, each)


def _order(rule: Rule, dims: Dims, shape: tuple[int, ...]) -> Order | None:
    if rule.transpose:
        return Order(shape[::-1], (1, 0), shape[0])
    if rule.rotary:
        heads = dims[rule.rotary]
        view = (heads, 2, shape[0] // heads // 2, *shape[1:])
        return Order(view, (0, 2, 1, 3)[: len(view)], shape[-1])
    return None


def _rename(
    renames: tuple[tuple[str, str], ...], stored: Mapping[str, TensorInfo]
) -> Mapping[str, TensorInfo]:
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


def _at(pattern: str, layer: int | None, expert: int | None = None) -> str:
    return pattern.replace("{i}", str(layer)).replace("{e}", str(expert))


def _show(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "()"


def _llama_order(tensor: OutputTensor) -> tuple[int, str]:
    """llama.cpp keeps tensors outside the layers first, then by layer, then by name."""
    block = re.match(r"blk\.(\d+)\.", tensor.name)
    return (int(block[1]) if block else -1, tensor.name)
