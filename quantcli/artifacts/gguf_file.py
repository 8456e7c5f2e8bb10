"""A GGUF file, or the shards of one: every offset first, then each tensor's rows in its format.

`prepare_gguf` decides and checks everything; `quantcli.artifacts.write` then fills the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantcli import __version__
from quantcli.artifacts.atomic import AtomicFiles, refuse_existing, refuse_own
from quantcli.artifacts.bias_corrections import BiasCorrections, add_biases
from quantcli.artifacts.encode_rows import encode_rows
from quantcli.artifacts.gguf_container import (
    FileLayout,
    TensorEntry,
    lay_out_shards,
    shard_paths,
)
from quantcli.artifacts.gguf_shards import GgufShards
from quantcli.artifacts.held_output import HeldOutput, RowsPlace
from quantcli.artifacts.nvfp4_scales import ScaledWeights, add_scales
from quantcli.artifacts.shards import split_shards
from quantcli.artifacts.slabs import (
    SLAB_BYTES,
    UNFINISHED,
    Slab,
    cut_tensor,
    digest_model,
    refuse_weight,
)
from quantcli.artifacts.staging import held_bytes
from quantcli.artifacts.stream import STREAM, StreamSink, check_stream
from quantcli.artifacts.write import ArtifactPart, Chunk, StoredLines
from quantcli.errors import UsageError, WeightError
from quantcli.formats import native
from quantcli.model import Model
from quantcli.plan.budget import check_disk, thread_memory
from quantcli.plan.planner import Plan, TensorPlan, make_plan
from quantcli.plan.recipe import Recipe
from quantcli.plan.recipe_file import dump_recipe, recorded
from quantcli.plan.size_text import parse_size
from quantcli.sources.imatrix import Importance
from quantcli.types import MetaValue, Note, OutputTensor, text, u32

DIGEST_KEY = "quantcli.source.digest"

Encoder = Callable[[TensorPlan, int, NDArray[Any]], NDArray[np.uint8]]
"""Packed rows of a tensor from a row on: takes the plan's line, that row and the rows as read."""


class Encoded(Protocol):
    """Tensors that a method has encoded already."""

    def __contains__(self, name: str) -> bool:
        """Whether the tensor ``name`` is among them."""

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Its packed rows ``start:stop``, uint8 of shape (stop - start, row bytes)."""


@dataclass(frozen=True)
class GgufFile(GgufShards):
    """A decided quantization: everything but the weights has been read and checked.

    ``encoders`` make the rows of a tensor, by its name, in place of its block format's own encoder.
    The files of one that is ``held`` are there, and in them the tensors named in ``there``.
    """

    model: Model
    plan: Plan
    importance: Importance | None
    metadata: Mapping[str, MetaValue]
    shards: Mapping[Path, tuple[TensorPlan, ...]]
    layouts: Mapping[Path, FileLayout]
    force: bool
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    held: HeldOutput | None = None
    there: frozenset[str] = frozenset()

    @property
    def is_stream(self) -> bool:
        """Whether it goes to standard output, where nothing is written a second time."""
        return self.paths == (STREAM,)

    @property
    def hashed(self) -> bool:
        """It records the model's digest, but in a pipe, whose head has gone when that is known."""
        return not self.is_stream

    def open(self) -> AtomicFiles | StreamSink:
        """The files, to be written."""
        if self.held is not None:
            sizes = {path: layout.size for path, layout in self.layouts.items()}
            return AtomicFiles(sizes, force=self.force, held=self.held.files)
        if not self.is_stream:
            return super().open()
        (layout,), (items,) = self.layouts.values(), self.shards.values()
        extents = [(layout.offsets[item.tensor.name], item.nbytes) for item in items]
        return StreamSink(layout.size, [(0, len(layout.header)), *extents])

    @property
    def sealed(self) -> bool:
        """The id of several files is made of what they hold, which more decides than is told."""
        return len(self.shards) > 1

    @property
    def label(self) -> str:
        """What the user calls the model."""
        return self.model.label

    @property
    def source(self) -> object:
        """The model."""
        return self.model

    @property
    def thread_bytes(self) -> int:
        """Memory that a thread needs at most, as an estimate."""
        return thread_memory(self.plan, SLAB_BYTES)

    @property
    def notes(self) -> Sequence[Note]:
        """The model's, then the plan's."""
        return [*self.model.notes, *self.plan.notes]

    def parts(self) -> Iterator[ArtifactPart]:
        """The slabs of each tensor."""
        for path, items in self.shards.items():
            for item in items:
                offset = self.layouts[path].offsets[item.tensor.name]
                row_bytes = item.nbytes // max(1, item.tensor.rows)
                for slab in cut_tensor(self.model, item.tensor):
                    place = path, offset + slab.start * row_bytes
                    yield ArtifactPart(
                        slab,
                        partial(self.model.read_rows, item.tensor, slab.start, slab.stop),
                        partial(self._encode, item, slab, place),
                        partial(self._refuse, item, slab),
                        self._content(item, slab),
                        place,
                        _home(item.tensor, slab.start),
                        _stored_lines(self.model, item.tensor, slab),
                        item.tensor.name in self.there,
                    )

    def _content(self, item: TensorPlan, slab: Slab) -> tuple[Slab, str, int] | None:
        """What decides the bytes of a slab; None where no other file has the same."""
        if item.tensor.name in self.encoders:
            return None
        return slab, item.format, id(self.importance) if item.importance else 0

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors."""
        return self.plan.bits_per_weight

    @property
    def source_bytes(self) -> int:
        """Bytes of the source that are read."""
        return sum(self.model.stored_bytes(item.tensor) for item in self.plan.items)

    def digest(self, leaves: Mapping[Slab, bytes]) -> str | None:
        """The digest of the model's weights."""
        return digest_model(self.model, leaves) if self.hashed else None

    def tails(self, digest: str | None, content: str) -> Iterator[Chunk]:
        """The headers again, with the digest in its place and the id of the set made of both."""
        if digest is not None:
            metadata = {**self.metadata, DIGEST_KEY: text(digest)}
            layouts = _lay_out(metadata, self.shards, content)
            yield from replace(self, metadata=metadata, layouts=layouts).heads()

    def _encode(
        self, item: TensorPlan, slab: Slab, place: tuple[Path, int], rows: NDArray[Any]
    ) -> Iterator[Chunk]:
        yield *place, self._pack(item, slab, rows).data

    def _pack(self, item: TensorPlan, slab: Slab, rows: NDArray[Any]) -> NDArray[np.uint8]:
        """The rows as the file holds them."""
        tensor = item.tensor
        if tensor.name in self.encoders:
            return self.encoders[tensor.name](item, slab.start, rows)
        return encode_rows(item, slab.start, rows, self.importance)

    def _refuse(
        self, item: TensorPlan, slab: Slab, refused: native.UnencodableError
    ) -> WeightError:
        row = slab.start + refused.row
        info, row, column = self.model.origin(item.tensor, row, refused.column)
        hint = "a wider type can hold it, such as --tensor-type with F32"
        return refuse_weight(refused, info.file, info.name, row, column, wider=hint)


def _home(tensor: OutputTensor, row: int) -> tuple[str, int]:
    """The stored tensor that a row comes from, and about which row of it; else the tensor itself.

    Of rows that are stored in another order, the first of the group that holds it.
    """
    for piece in tensor.pieces:
        if row < piece.rows and (piece.order is None or piece.transposes):
            return piece.source, piece.start + row
        if row < piece.rows:
            made, stored = piece.group
            return piece.source, piece.start + row // made * stored
        row -= piece.rows
    return tensor.name, row


def _stored_lines(model: Model, tensor: OutputTensor, slab: Slab) -> StoredLines | None:
    """The stored rows or columns that a slab is; None where they are moved, changed or computed."""
    start, stop = slab.start, slab.stop
    for piece in tensor.pieces:
        if start < piece.rows:
            break
        start, stop = start - piece.rows, stop - piece.rows
    else:
        return None
    if stop > piece.rows or piece.pointwise is not None:
        return None
    if piece.order is None:
        return piece.source, False, piece.start + start, piece.start + stop
    flat = len(model.store.tensors[piece.source].shape) == 2
    if piece.transposes and flat and not model.holds_blocks(piece.source):
        return piece.source, True, start, stop
    return None


def prepare_gguf(
    model: Model,
    recipe: Recipe,
    output: Path,
    *,
    importance: Importance | None = None,
    plan: Plan | None = None,
    force: bool = False,
    check: bool = True,
) -> GgufFile:
    """Decide everything about quantizing ``model`` to ``output`` without reading a weight.

    ``check=False`` leaves out the checks on the output's place (for a dry run). A ``plan`` that
    was made already is taken as it is. Raises PlanError, OutputError or UsageError before any
    work is done.
    """
    if recipe.to != "gguf":
        raise UsageError(f"--to {recipe.to} makes a model folder, not a GGUF")
    shapes = None
    if importance is not None:
        shapes = {name: values.shape for name, values in importance.entries.items()}
    plan = plan or make_plan(
        model.tensors, model.metadata, recipe, importance=shapes, from_gguf=model.from_gguf
    )
    plan = add_scales(plan, model)
    if recipe.correct_bias:
        plan = add_biases(plan, model)
    limit = parse_size(recipe.split_max_size) if recipe.split_max_size else None
    groups = split_shards(plan.items, lambda item: plan.aligned(item.nbytes), limit)
    paths = shard_paths(output, len(groups))
    metadata = _describe(model, plan, importance)
    if output == STREAM:
        if len(paths) > 1:
            raise UsageError(
                "--split-max-size makes several files, and standard output is one",
                hint="leave it out, or name a file with -o",
            )
        del metadata[DIGEST_KEY]
        paths = [STREAM]
    shards = {path: tuple(group) for path, group in zip(paths, groups, strict=True)}
    layouts = _lay_out(metadata, shards)
    scaled = ScaledWeights(model, plan, None if recipe.range == "mse" else importance)
    encoders: dict[str, Encoder] = dict.fromkeys(scaled.names, scaled)
    if recipe.correct_bias:
        corrections = BiasCorrections(model, plan, importance)
        encoders |= dict.fromkeys(corrections.names, corrections)
    artifact = GgufFile(model, plan, importance, metadata, shards, layouts, force, encoders)
    if check and artifact.is_stream:
        check_stream()
    elif check:
        read = {info.file for info in model.store.tensors.values()}
        if importance is not None and importance.path.name:
            read.add(importance.path)
        refuse_own(artifact.paths, read)
        refuse_existing(artifact.paths, force=force)
        check_disk(artifact.nbytes - held_bytes(artifact.paths), output.parent)
    return artifact


def add_metadata(artifact: GgufFile, keys: Mapping[str, MetaValue]) -> GgufFile:
    """The same file with more key-values in its header."""
    metadata = {**artifact.metadata, **keys}
    return replace(artifact, metadata=metadata, layouts=_lay_out(metadata, artifact.shards))


def hold_output(artifact: GgufFile, *, whole: bool = False) -> HeldOutput:
    """The file as it is filled before all of it is known; ``whole``: it is published already."""
    sizes = {path: layout.size for path, layout in artifact.layouts.items()}
    places = {}
    for path, items in artifact.shards.items():
        for item in items:
            name, rows = item.tensor.name, item.tensor.rows
            offset = artifact.layouts[path].offsets[name]
            places[name] = RowsPlace(path, offset, rows, item.nbytes // max(1, rows))
    return HeldOutput(sizes, places, whole=whole)


def take_encoded(artifact: GgufFile, encoded: Encoded, held: HeldOutput | None = None) -> GgufFile:
    """The same file with the tensors in ``encoded`` as they are there.

    Where it is ``held``, they lie at their places.
    """

    def encoder(item: TensorPlan, start: int, rows: NDArray[Any]) -> NDArray[np.uint8]:
        return encoded.read_rows(item.tensor.name, start, start + len(rows))

    names = [item.tensor.name for item in artifact.plan.items if item.tensor.name in encoded]
    encoders = {**artifact.encoders, **dict.fromkeys(names, encoder)}
    there = frozenset(names) if held is not None else frozenset()
    return replace(artifact, encoders=encoders, held=held, there=there)


def _lay_out(
    metadata: Mapping[str, MetaValue],
    shards: Mapping[Path, Sequence[TensorPlan]],
    content: str = "",
) -> dict[Path, FileLayout]:
    entries = {
        path: [
            TensorEntry(item.tensor.name, item.tensor.shape, item.type_id, item.nbytes)
            for item in items
        ]
        for path, items in shards.items()
    }
    return lay_out_shards(metadata, entries, content)


def _describe(model: Model, plan: Plan, importance: Importance | None) -> dict[str, MetaValue]:
    """The output's key-values: the model's own, the quantization's, and where it came from."""
    keys = dict(model.metadata)
    keys["general.quantization_version"] = u32(2)
    keys["general.file_type"] = u32(plan.file_type)
    if importance is not None:
        if importance.path.name:
            keys["quantize.imatrix.file"] = text(importance.path.name)
        if importance.datasets:
            keys["quantize.imatrix.dataset"] = text(importance.datasets[0])
        keys["quantize.imatrix.entries_count"] = u32(len(importance.entries))
        if importance.chunks:
            keys["quantize.imatrix.chunks_count"] = u32(importance.chunks)
    keys |= plan.overrides
    keys["quantcli.version"] = text(__version__)
    recipe = recorded(plan.recipe)
    keys["quantcli.recipe"] = text(dump_recipe(recipe))
    if model.repo:
        keys["quantcli.source.repo"] = text(model.repo)
    if model.revision:
        keys["quantcli.source.revision"] = text(model.revision)
    keys[DIGEST_KEY] = text(UNFINISHED)
    return keys
