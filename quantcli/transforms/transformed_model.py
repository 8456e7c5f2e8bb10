"""A model seen through a transform: the same tensors, their rows changed as they are read.

It is a `Model` like any other, so it is calibrated, evaluated and quantized as one, and another
transform goes on top of it. Scales and rotations of a row's columns apply to any slab. A
rotation of rows needs whole groups of rows; of a matrix that writes to the residual stream that
is the whole matrix, so the last few of these are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import ArchitectureError, SourceError
from quantcli.formats import FORMATS, get_format
from quantcli.formats.base import Floats
from quantcli.model import TRANSFORMS_KEY, Model
from quantcli.transforms.spec import Operation, RotationRef, TransformSpec, dump_transform
from quantcli.types import OutputTensor, text

_KEPT = 3
"""Groups of turned rows that are kept; threads work on slabs of at most two or three tensors."""

_LEAST_BITS = 8
"""Bits per weight of stored blocks that lose next to nothing."""


@dataclass(frozen=True)
class TransformedModel(Model):
    """``base`` with ``transform`` applied; closing it closes the base's files."""

    base: Model = field(kw_only=True)
    transform: TransformSpec = field(kw_only=True)
    _sources: Mapping[str, OutputTensor] = field(kw_only=True, repr=False, compare=False)
    _groups: _Groups = field(kw_only=True, repr=False, compare=False)

    def read_rows(self, tensor: OutputTensor, start: int, stop: int) -> NDArray[np.generic]:
        """As `Model.read_rows`; what the transform changes comes as float32."""
        operation = self.transform.operations.get(tensor.name)
        if operation is None:
            return self.base.read_rows(tensor, start, stop)
        if operation.values is not None:
            return super().read_rows(tensor, start, stop)
        turn = operation.rows_rotation
        if turn is None:
            return self._unrotated(tensor, operation, start, stop)
        parts = []
        size = self.transform.rotations[turn.rotation].size
        for first, last in _spans(turn, size, start, stop, tensor.rows):
            low, high = max(start, first), min(stop, last)
            if turn.first <= first < turn.last:
                parts.append(self._rotated(tensor, turn, first, last)[low - first : high - first])
            else:
                parts.append(self._unrotated(tensor, operation, low, high))
        # What is kept is never handed out: rows are the caller's to change.
        return np.concatenate(parts)

    def _rotated(self, tensor: OutputTensor, turn: RotationRef, first: int, last: int) -> Floats:
        """Rows ``first:last``, which are one whole group, after the rotation of rows."""

        def make() -> Floats:
            operation = self.transform.operations[tensor.name]
            rows = self._unrotated(tensor, operation, first, last)
            turned = self.transform.rotations[turn.rotation].apply(rows.T)
            return np.ascontiguousarray(turned.T, np.float32)

        return self._groups.get((tensor.name, first), make)

    def _unrotated(
        self, tensor: OutputTensor, operation: Operation, start: int, stop: int
    ) -> Floats:
        """Rows with everything done to them but the rotation of rows."""
        rows = self.base.read_floats(self._sources[tensor.name], start, stop)
        if operation.columns is not None:
            factors = operation.columns
            if factors.ndim > 1:
                each = tensor.rows // len(factors)
                factors = factors[np.arange(start, stop) // each]
            rows = rows * factors
        if operation.rows is not None:
            rows = rows * operation.rows[start:stop, None]
        turn = operation.columns_rotation
        if turn is not None:
            within = slice(turn.first, turn.last)
            rows[:, within] = self.transform.rotations[turn.rotation].apply(rows[:, within])
        return np.ascontiguousarray(rows, np.float32)


def apply_transform(model: Model, transform: TransformSpec) -> TransformedModel:
    """``model`` with its weights transformed; nothing is read.

    A head that the transform makes out of the embeddings becomes a separate tensor, and the
    configuration then says that the two are not tied. ArchitectureError when the transform is of
    another model, SourceError when weights that it changes are quantized already.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    changed, sources = [], {}
    for name, operation in transform.operations.items():
        source = tensors.get(operation.source or name)
        if source is None:
            raise ArchitectureError(f"{model.label} has no tensor {operation.source or name}")
        _check(model, source, operation)
        sources[name] = source
        changed.append(replace(source, name=name, dtype="F32", values=operation.values))
    config = dict(model.config)
    if config and any(name not in tensors for name in transform.operations):
        config["tie_word_embeddings"] = False
    done = (
        json.loads(str(model.metadata[TRANSFORMS_KEY].value))
        if TRANSFORMS_KEY in model.metadata
        else []
    )
    done.append(
        {
            "method": transform.method,
            "settings": dict(transform.settings),
            "sha256": hashlib.sha256(dump_transform(transform)).hexdigest(),
        }
    )
    return TransformedModel(
        model.label, model.path, model.arch,
        {**model.metadata, TRANSFORMS_KEY: text(json.dumps(done, sort_keys=True))},
        _in_order(model.tensors, changed), model.store, model.from_gguf, config,
        model.notes, model.repo, model.revision,
        base=model, transform=transform, _sources=sources, _groups=_Groups(),
    )  # fmt: skip


class _Groups:
    """The last few groups of turned rows; each is made once, whatever the number of threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int], tuple[Lock, list[Floats]]] = OrderedDict()

    def get(self, key: tuple[str, int], make: Callable[[], Floats]) -> Floats:
        with self._lock:
            lock, made = self._kept.setdefault(key, (Lock(), []))
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        with lock:
            if not made:
                made.append(make())
            return made[0]


def _spans(
    turn: RotationRef, size: int, start: int, stop: int, rows: int
) -> Iterator[tuple[int, int]]:
    """Rows ``start:stop`` cut at the edges of the turn and of its groups."""
    if start < turn.first:
        yield 0, turn.first
    for first in range(turn.first, turn.last, size):
        if first < stop and start < first + size:
            yield first, first + size
    if stop > turn.last:
        yield turn.last, rows


def _check(model: Model, tensor: OutputTensor, operation: Operation) -> None:
    if tensor.dtype in FORMATS and get_format(tensor.dtype).bits < _LEAST_BITS:
        raise SourceError(
            f"{model.path}: {tensor.name} is stored as {tensor.dtype}, and what transforms it "
            "quantizes it a second time",
            hint="use the original model",
        )
    for key, size in (("columns", tensor.columns), ("rows", tensor.rows)):
        factors = getattr(operation, key)
        if factors is not None and factors.shape[-1] != size:
            raise ArchitectureError(
                f"the transform has {factors.shape[-1]} factors for the {key} of {tensor.name}, "
                f"but {model.label} has {size} there"
            )


def _in_order(
    tensors: tuple[OutputTensor, ...], changed: list[OutputTensor]
) -> tuple[OutputTensor, ...]:
    """The model's order, with a new head where llama.cpp keeps it: before the final norm."""
    by_name = {tensor.name: tensor for tensor in changed}
    found = [by_name.pop(tensor.name, tensor) for tensor in tensors]
    names = [tensor.name for tensor in found]
    place = names.index("output_norm.weight") if "output_norm.weight" in names else 0
    return (*found[:place], *by_name.values(), *found[place:])
