"""Whether an artifact is sound, and how far its weights are from those of another.

Opening it has already held every offset and size against the file. Here every weight is decoded:
a scale or a weight that is not finite is found and named. With a source, each tensor's error
against it is measured, and the digest that quantcli wrote into the artifact is computed again from
the source's bytes, which tells whether the artifact was made from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.atomic_folder import MANIFEST
from quantcli.artifacts.slabs import (
    UNFINISHED,
    Slab,
    cut_tensor,
    digest_model,
    hash_rows,
    work_slabs,
)
from quantcli.errors import ArchitectureError
from quantcli.exports.gguf_checkpoint import find_config, view_checkpoint
from quantcli.exports.settings import token_texts
from quantcli.formats import FORMATS, get_format, native
from quantcli.model import Model
from quantcli.sources.files import read_json
from quantcli.sources.gguf import GgufCheckpoint
from quantcli.tensor_scales import multiply_scales, row_scales
from quantcli.types import Event, MetaValue, Note, OutputTensor

DIGEST = "quantcli.source.digest"
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3")
_HUGE = 1 << 28
"""Weights beyond this are more than any block with float16 scales holds."""


@dataclass(frozen=True, slots=True)
class TensorError:
    """A tensor's difference from the source's.

    ``relative`` is the root mean square of the difference over that of the source's weights (None
    where those are all zero), ``largest`` the largest absolute difference of a weight.
    """

    relative: float | None
    largest: float


@dataclass(frozen=True, slots=True)
class Line:
    """One tensor: what it is, and its error where there is a source that has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    error: TensorError | None = None


@dataclass(frozen=True, slots=True)
class VerificationDone(Event):
    """The verdict. ``problems`` are sentences, empty when the artifact is sound.

    ``made_from`` tells whether the source is what the artifact was made from; None where there is
    no source or the artifact does not say.
    """

    lines: tuple[Line, ...]
    problems: tuple[str, ...]
    overall: TensorError | None = None
    made_from: bool | None = None


@dataclass
class _Sums:
    """Running sums of one tensor."""

    squares: float = 0.0
    reference: float = 0.0
    largest: float = 0.0

    def error(self) -> TensorError:
        if self.reference > 0:
            relative: float | None = math.sqrt(self.squares / self.reference)
        else:
            relative = 0.0 if self.squares == 0 else None
        return TensorError(relative, self.largest)


@dataclass(frozen=True, slots=True)
class _Part:
    """What a slab of rows gave."""

    sums: _Sums
    leaf: bytes
    fault: str | None


def verify(model: Model, against: Model | None = None, *, threads: int = 1) -> Iterator[Event]:
    """Check every weight of ``model``, yielding progress and notes, at last `VerificationDone`."""
    problems = [*_check_digest(*_recorded(model)), *_check_vocabulary(model)]
    yield from _check_table(model)
    others = {} if against is None else {tensor.name: tensor for tensor in against.tensors}
    pairs = [(tensor, others.get(tensor.name)) for tensor in model.tensors]
    if against is not None:
        problems += _check_names(model, against)
        pairs = [(a, b if b is None or b.shape == a.shape else None) for a, b in pairs]
    sums = {tensor.name: _Sums() for tensor, _ in pairs}
    # The source's slabs where it has the tensor, since its digest is made of them.
    cuts = [
        (tensor, other, slab)
        for tensor, other in pairs
        for slab in (
            cut_tensor(model, tensor)
            if against is None or other is None
            else cut_tensor(against, other)
        )
    ]
    ours, theirs = _Side(model), None if against is None else _Side(against)
    tasks = [(cut[2], partial(_measure, ours, theirs, *cut)) for cut in cuts]
    parts = yield from work_slabs(tasks, threads)
    faulty = set()
    for slab, part in zip((slab for slab, _ in tasks), parts, strict=True):
        into = sums[slab.tensor]
        into.squares += part.sums.squares
        into.reference += part.sums.reference
        into.largest = max(into.largest, part.sums.largest)
        if part.fault is not None and slab.tensor not in faulty:
            faulty.add(slab.tensor)
            problems.append(part.fault)
    leaves = {slab: part.leaf for (slab, _), part in zip(tasks, parts, strict=True)}
    lines = tuple(
        Line(
            tensor.name, tensor.shape, tensor.dtype, model.stored_bytes(tensor),
            None if other is None else sums[tensor.name].error(),
        )
        for tensor, other in pairs
    )  # fmt: skip
    yield VerificationDone(
        lines, tuple(problems), _overall(sums, lines), _made_from(model, against, leaves)
    )


def stored_keys(model: Model) -> Mapping[str, MetaValue]:
    """All key-values of a GGUF, those of its quantization included; none for a checkpoint."""
    return model.store.metadata if isinstance(model.store, GgufCheckpoint) else {}


class _Side:
    """A model, and what its weights are multiplied by."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._factors = row_scales(model)

    def read(self, tensor: OutputTensor, slab: Slab) -> NDArray[Any]:
        """A slab's rows as they are stored."""
        return self.model.read_rows(tensor, slab.start, slab.stop)

    def decode(self, tensor: OutputTensor, slab: Slab, rows: NDArray[Any]) -> NDArray[Any] | None:
        """Weights of these rows; None for integers, which are no weights."""
        if rows.dtype != np.uint8:
            return rows
        if tensor.dtype not in FORMATS:
            return None
        values = native.decode(get_format(tensor.dtype), rows)
        factors = self._factors.get(tensor.name)
        return values if factors is None else values * factors[slab.start : slab.stop]


def _measure(
    ours: _Side,
    theirs: _Side | None,
    tensor: OutputTensor,
    other: OutputTensor | None,
    slab: Slab,
) -> _Part:
    values = ours.decode(tensor, slab, ours.read(tensor, slab))
    leaf = b""
    if values is None:
        return _Part(_Sums(), leaf, None)
    fault = _find_fault(ours.model, tensor, values, slab.start)
    if theirs is None or other is None:
        return _Part(_Sums(), leaf, fault)
    stored = theirs.read(other, slab)
    leaf = hash_rows(stored)
    wanted = theirs.decode(other, slab, stored)
    if wanted is not None and fault is None:
        fault = _find_lost(ours.model, tensor, values, theirs.model, wanted, slab.start)
    if wanted is None or fault is not None:
        return _Part(_Sums(), leaf, fault)
    wide = wanted.astype(np.float64)
    apart = values.astype(np.float64) - wide
    sums = _Sums(
        float(np.square(apart).sum()), float(np.square(wide).sum()),
        float(np.abs(apart).max(initial=0.0)),
    )  # fmt: skip
    return _Part(sums, leaf, None)


def _find_fault(model: Model, tensor: OutputTensor, values: NDArray[Any], start: int) -> str | None:
    finite = np.isfinite(values.astype(np.float32, copy=False))
    if finite.all():
        return None
    row, column = (int(i) for i in np.unravel_index(int(np.argmin(finite)), finite.shape))
    what = "a weight" if tensor.dtype in _FLOATS else "a block with a weight"
    return (
        f"{model.path}: {tensor.name} ({tensor.dtype}) has {what} {values[row, column]} at row "
        f"{start + row}, column {column}"
    )


def _find_lost(
    model: Model,
    tensor: OutputTensor,
    values: NDArray[Any],
    against: Model,
    wanted: NDArray[Any],
    start: int,
) -> str | None:
    """A huge weight of the source of which less than half is left: beyond the format's reach."""
    if np.abs(wanted).max(initial=0.0) < _HUGE:
        return None
    huge = np.abs(wanted.astype(np.float64))
    lost = (huge >= _HUGE) & (np.abs(values.astype(np.float64) - wanted) > huge / 2)
    if not lost.any():
        return None
    row, column = (int(i) for i in np.unravel_index(int(np.argmax(lost)), lost.shape))
    return (
        f"{model.path}: {tensor.name} ({tensor.dtype}) lost the weight {wanted[row, column]!s} of "
        f"{against.path} at row {start + row}, column {column}: {values[row, column]!s} is left"
    )


def _recorded(model: Model) -> tuple[str, object]:
    """Where quantcli recorded the source's digest, and what stands there; None where it did not."""
    manifest = model.path / MANIFEST
    if model.from_gguf or not manifest.is_file():
        found = stored_keys(model).get(DIGEST)
        return DIGEST, None if found is None else found.value
    source = read_json(manifest).get("source")
    return f"{manifest}: the digest", source.get("digest") if isinstance(source, dict) else None


def _check_digest(where: str, digest: object) -> list[str]:
    if digest is None:
        return []
    if digest == UNFINISHED:
        return [f"{where} is empty, as of an artifact that was not finished"]
    if not isinstance(digest, str) or not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        return [f"{where} is {digest!r}, which is no SHA-256"]
    return []


def _check_vocabulary(model: Model) -> list[str]:
    tokens = token_texts(model.metadata)
    embedding = next((t for t in model.tensors if t.name == "token_embd.weight"), None)
    if not tokens or embedding is None or len(tokens) == embedding.shape[0]:
        return []
    return [
        f"{model.path}: {len(tokens)} tokens, but {embedding.shape[0]} rows in token_embd.weight"
    ]


def _check_table(model: Model) -> Iterator[Note]:
    """A note where the tensors cannot be held against their architecture's table."""
    if not model.from_gguf:
        return
    try:
        view_checkpoint(model, find_config(model))
    except ArchitectureError as unknown:
        yield Note(f"names and shapes were not held against a table: {unknown.message}")


def _check_names(model: Model, against: Model) -> list[str]:
    ours, theirs = (
        {tensor.name: tensor for tensor in multiply_scales(each).tensors}
        for each in (model, against)
    )
    problems = [
        f"{lacking.path} has no tensor {name}, which {holder.path} has"
        for lacking, holder, names in (
            (model, against, theirs.keys() - ours.keys()),
            (against, model, ours.keys() - theirs.keys()),
        )
        for name in sorted(names)
    ]
    return problems + [
        f"{name} has shape {ours[name].shape} in {model.path} and {theirs[name].shape} in "
        f"{against.path}"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name].shape != theirs[name].shape
    ]


def _overall(sums: Mapping[str, _Sums], lines: tuple[Line, ...]) -> TensorError | None:
    whole = _Sums()
    compared = [line.name for line in lines if line.error is not None]
    for name in compared:
        whole.squares += sums[name].squares
        whole.reference += sums[name].reference
        whole.largest = max(whole.largest, sums[name].largest)
    return whole.error() if compared else None


def _made_from(model: Model, against: Model | None, leaves: Mapping[Slab, bytes]) -> bool | None:
    found = stored_keys(model).get(DIGEST)
    if against is None or found is None:
        return None
    if any(
        not leaves.get(slab) for tensor in against.tensors for slab in cut_tensor(against, tensor)
    ):
        return False
    return digest_model(against, leaves) == str(found.value)
