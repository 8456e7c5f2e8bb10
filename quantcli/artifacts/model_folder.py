"""A model folder: every offset first, then each stored tensor's rows on the folder's grid.

`prepare_folder` decides and checks everything; `quantcli.artifacts.write` then fills the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.atomic_folder import MANIFEST, refuse_folder
from quantcli.artifacts.folder_files import make_settings
from quantcli.artifacts.nearest_codes import CodeSource, RoundToNearest, column_weights
from quantcli.artifacts.nvfp4_scales import TensorScales, choose_scaled
from quantcli.artifacts.safetensors_shards import (
    LARGEST,
    FolderArtifact,
    SafetensorsShards,
    lay_out_shards,
)
from quantcli.artifacts.slabs import (
    SLAB_BYTES,
    UNFINISHED,
    Slab,
    combine_digest,
    cut_slabs,
    refuse_weight,
)
from quantcli.artifacts.staging import held_bytes
from quantcli.artifacts.static_scales import StaticScales, declare_scales, place_scales
from quantcli.artifacts.write import ArtifactPart, Chunk
from quantcli.errors import PlanError, WeightError
from quantcli.formats import get_format, native, scaled_nvfp4
from quantcli.layouts import find_layout
from quantcli.layouts.base import DTYPES as ARRAY_DTYPES
from quantcli.layouts.base import ROWS, Patch
from quantcli.model import Model
from quantcli.plan.budget import check_disk
from quantcli.plan.folders import Copy, FolderPlan, Item, make_folder_plan
from quantcli.plan.linear_layers import natural
from quantcli.plan.recipe import Recipe
from quantcli.plan.schemes import has_types
from quantcli.plan.size_text import parse_size
from quantcli.sources.imatrix import Importance
from quantcli.types import Declared, Note

_WORKING_BYTES = 24 << 20
"""What a thread holds for one slab beyond its rows as stored: floats, codes, and a chunk's
temporaries."""


@dataclass(frozen=True)
class ModelFolder(FolderArtifact):
    """A decided model folder: everything but the weights has been read and checked.

    ``codes`` gives the codes in place of rounding to nearest, ``scales`` those that were found
    beforehand, ``tensor_scales`` those of whole tensors under which weights go through a block
    format.
    """

    model: Model
    plan: FolderPlan
    importance: Importance | None
    path: Path
    weights: SafetensorsShards
    files: Mapping[str, bytes]
    force: bool
    codes: CodeSource | None = None
    scales: StaticScales | None = None
    tensor_scales: TensorScales | None = None

    @property
    def hashed(self) -> bool:
        """It records the model's digest."""
        return True

    @property
    def label(self) -> str:
        """What the user calls the model."""
        return self.model.label

    @property
    def source(self) -> object:
        """The stored tensors."""
        return self.model.store

    @property
    def thread_bytes(self) -> int:
        """Rows as stored and what is made of them; 32 rows at least, however long they are."""
        longest = max((item.columns for item in self.plan.items), default=0)
        return 4 * max(SLAB_BYTES, 4 * ROWS * longest) + _WORKING_BYTES

    @property
    def notes(self) -> Sequence[Note]:
        """The plan's."""
        return self.plan.notes

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors, scales and zero points included."""
        return 8 * self.weights.tensor_bytes / max(1, self.plan.elements)

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(info.nbytes for info in self.model.store.tensors.values())

    def nbytes_of(self, item: Item | Copy) -> int:
        """Bytes that a matrix or a copied tensor takes in the output."""
        if isinstance(item, Copy):
            return item.rows * item.columns * (4 if item.dtype == "F32" else 2)
        if item.scheme is None:
            return item.matrix.elements * (4 if item.dtype == "F32" else 2)
        declared = item.scheme.packing.declare(item.matrix, item.scheme.grid)
        return sum(tensor.nbytes for tensor in declared) // max(1, item.matrix.stack)

    def parts(self) -> Iterator[ArtifactPart]:
        """The slabs of each matrix and each copied tensor, in the order of the stored tensors."""
        codes = self.codes
        if codes is None and self.plan.schemes:
            codes = RoundToNearest(self.plan, self.model.store, self.importance, SLAB_BYTES)
        items: list[Item | Copy] = [*self.plan.items, *self.plan.copies]
        items.sort(key=lambda item: (natural(item.source), item.first))
        for (_, rows), group in groupby(items, key=self._span):
            alike = tuple(group)
            item = alike[0]
            info = self.model.store.tensors[item.source]
            nbytes = info.nbytes * len(rows) * item.columns // max(1, info.elements)
            for slab in cut_slabs(item.source, rows, nbytes, multiple=ROWS):
                encode = partial(self._encode, item, slab, codes)
                by_columns = isinstance(item, Item) and item.matrix.transpose
                if by_columns:
                    encode = partial(self._encode_columns, alike, slab)
                yield ArtifactPart(
                    slab,
                    partial(self._read, item, slab),
                    encode,
                    partial(self._refuse, item, slab),
                    home=(item.source, slab.start),
                    stored=(item.source, by_columns, slab.start, slab.stop),
                )

    def digest(self, leaves: Mapping[Slab, bytes]) -> str:
        """The digest of the stored tensors that are in the folder."""
        slabs = sorted(leaves, key=lambda slab: (natural(slab.tensor), slab.start))
        return combine_digest(
            (self.model.store.tensors[name], [leaves[slab] for slab in group])
            for name, group in groupby(slabs, key=lambda slab: slab.tensor)
        )

    def tails(self, digest: str | None, content: str) -> Iterator[Chunk]:
        """The scales that were found beforehand, and the manifest with the digest in its place."""
        if self.plan.needs_text:
            if self.scales is None:
                raise ValueError("no text has told the scales of activations")
            for patch in place_scales(self.plan, self.scales):
                yield from self._place(patch)
        manifest = self.files[MANIFEST].replace(UNFINISHED.encode(), (digest or "").encode())
        yield MANIFEST, 0, manifest

    def _read(self, item: Item | Copy, slab: Slab) -> NDArray[Any]:
        if isinstance(item, Item) and item.matrix.transpose:
            return self.model.store.read_columns(item.source, slab.start, slab.stop)
        return self.model.store.read_rows(item.source, slab.start, slab.stop)

    def _encode(
        self, item: Item | Copy, slab: Slab, codes: CodeSource | None, rows: NDArray[Any]
    ) -> Iterator[Chunk]:
        start = slab.start - item.first
        if isinstance(item, Copy):
            yield from self._place(Patch(item.name, _cast(rows, item.dtype), item.row + start))
        elif item.scheme is None:
            values = self._decoded(item, rows)
            yield from self._place(Patch(item.source, values, item.first + start))
        elif codes is not None:
            coded = codes(item.matrix, start, rows)
            scheme = item.scheme
            for patch in scheme.packing.place(item.matrix, scheme.grid, start, coded):
                yield from self._place(patch)

    def _encode_columns(
        self, alike: Sequence[Item | Copy], slab: Slab, rows: NDArray[Any]
    ) -> Iterator[Chunk]:
        """Columns of a stored matrix, as rows, each through the format of the item that has it."""
        items = [item for item in alike if isinstance(item, Item)]
        values = np.empty(rows.shape, ARRAY_DTYPES[items[0].dtype])
        if sum(item.rows for item in items) < len(self._span(items[0])[1]):
            values[...] = _cast(rows, items[0].dtype)
        for item in items:
            step, first = item.matrix.step, item.first - slab.start
            start = first % step if first < 0 else first
            own = slice(start, max(start, first + item.rows * step), step)
            if start >= min(own.stop, len(rows)):
                continue
            try:
                values[own] = self._decoded(item, rows[own])
            except native.UnencodableError as refused:
                raise native.UnencodableError(
                    refused.row * step + start, refused.column, refused.value, refused.reason
                ) from None
        row, column = self._corner(items[0], slab)
        turned = np.ascontiguousarray(values.T)
        yield from self._place(Patch(items[0].source, turned, row, column))

    def _span(self, item: Item | Copy) -> tuple[str, range]:
        """The stored rows that an item is read from, or all columns of the matrix that has them."""
        if isinstance(item, Item) and item.matrix.transpose:
            width = self.model.store.tensors[item.source].shape[-1]
            first = item.first // width * width
            return item.source, range(first, first + width)
        return item.source, range(item.first, item.first + item.rows)

    def _corner(self, item: Item, slab: Slab) -> tuple[int, int]:
        """The stored row and column where a slab of columns begins."""
        height, width = self.model.store.tensors[item.source].shape[-2:]
        matrix, column = divmod(slab.start, width)
        return matrix * height, column

    def _decoded(self, item: Item, rows: NDArray[Any]) -> NDArray[Any]:
        """The rows through a block format and back."""
        fmt, matrix = get_format(item.format or "F32"), item.matrix
        weights = column_weights(self.importance, matrix, item.importance)
        if self.tensor_scales is not None and matrix.tensor in self.tensor_scales:
            scale = self.tensor_scales[matrix.tensor]
            if self.plan.recipe.range == "mse":
                weights = None
            packed = scaled_nvfp4.encode(native.to_float32(rows), scale, weights)
            decoded = scaled_nvfp4.decode(packed, scale)
        else:
            decoded = native.decode(fmt, native.encode(fmt, rows, weights))
        return _cast(decoded, item.dtype)

    def _place(self, patch: Patch) -> Iterator[Chunk]:
        return self.weights.place(patch.tensor, patch.values, patch.row, patch.column)

    def _refuse(
        self, item: Item | Copy, slab: Slab, refused: native.UnencodableError
    ) -> WeightError:
        row, column = slab.start + refused.row, refused.column
        if isinstance(item, Item) and item.matrix.transpose:
            row, column = self._corner(item, slab)
            row, column = row + refused.column, column + refused.row
        if isinstance(item, Copy):
            hint = "--dtype F32 holds any weight"
        elif not self.plan.schemes:
            hint = "a wider type can hold it, such as --tensor-type with F32"
        else:
            hint = f"--keep '{item.matrix.module}' leaves its module as it is"
        info = self.model.store.tensors[item.source]
        return refuse_weight(refused, info.file, info.name, row, column, wider=hint)


def _cast(rows: NDArray[Any], dtype: str) -> NDArray[Any]:
    if rows.dtype == ARRAY_DTYPES[dtype]:
        return rows
    with np.errstate(over="ignore"):
        cast: NDArray[Any] = native.to_float32(rows).astype(ARRAY_DTYPES[dtype])
    lost = np.isinf(cast.astype(np.float32)) & np.isfinite(rows.astype(np.float64))
    if lost.any():
        row, column = (int(index) for index in np.argwhere(lost)[0])
        raise native.UnencodableError(row, column, float(rows[row, column]), f"overflows {dtype}")
    return cast


def prepare_folder(
    model: Model,
    recipe: Recipe,
    output: Path,
    *,
    importance: Importance | None = None,
    plan: FolderPlan | None = None,
    files: Mapping[str, bytes] | None = None,
    force: bool = False,
    check: bool = True,
) -> ModelFolder:
    """Decide everything about making ``output`` of ``model`` without reading a weight.

    ``check=False`` leaves out the checks on the output's place (for a dry run). A ``plan`` that
    was made already is taken as it is; ``files`` stand beside the weights in place of those of the
    same name. Raises PlanError, OutputError or UsageError before any work is done.
    """
    shapes = None
    if importance is not None:
        shapes = {name: values.shape for name, values in importance.entries.items()}
    plan = plan or make_folder_plan(model, recipe, importance=shapes)
    _check_packing(model, plan)
    declared = _declare(plan, model)
    limit = parse_size(recipe.split_max_size) if recipe.split_max_size else LARGEST
    header = {"format": find_layout(recipe.to).header}
    weights = lay_out_shards(header, declared, limit)
    files = make_settings(model, plan, weights) | dict(files or {})
    tensor_scales = None
    if has_types(recipe.to):
        formats = {tensor.name: "" for tensor in model.tensors}
        formats |= {item.matrix.tensor: item.format or "" for item in plan.items}
        tensor_scales = TensorScales(model, choose_scaled(model, recipe, formats))
    folder = ModelFolder(
        model, plan, importance, output, weights, files, force, tensor_scales=tensor_scales
    )
    if check:
        _refuse_source(model, output)
        refuse_folder(output, force=force)
        check_disk(folder.nbytes - held_bytes([output]), output.absolute().parent)
    return folder


def _check_packing(model: Model, plan: FolderPlan) -> None:
    """PlanError for a matrix that its scheme's packing does not take."""
    for item in plan.items:
        scheme, matrix = item.scheme, item.matrix
        reason = None if scheme is None else scheme.packing.refuse(matrix, scheme.grid)
        if scheme is not None and reason is not None:
            info = model.store.tensors[matrix.source]
            raise PlanError(
                f"{info.file}: {info.name} ({matrix.rows} x {matrix.columns}) does not fit "
                f"--to {scheme.layout.name}: {reason}",
                hint=f"--keep '{matrix.module}' leaves it as it is",
            )


def _declare(plan: FolderPlan, model: Model) -> list[Declared]:
    declared = [
        Declared(copy.name, copy.dtype, copy.shape) for copy in plan.copies if copy.row == 0
    ]
    sources = {item.matrix.source: item.dtype for item in plan.items if item.scheme is None}
    declared += [
        Declared(name, dtype, model.store.tensors[name].shape) for name, dtype in sources.items()
    ]
    for item in plan.items:
        if item.scheme is not None and item.matrix.slot == 0:
            declared += item.scheme.packing.declare(item.matrix, item.scheme.grid)
    declared += declare_scales(plan)
    twice = next((name for name, n in Counter(t.name for t in declared).items() if n > 1), None)
    if twice is not None:
        raise PlanError(
            f"--to {plan.recipe.to} would hold several tensors {twice}, since a folder has this "
            "name for several of the checkpoint",
            hint="--to hf keeps the names of stored tensors",
        )
    return sorted(declared, key=lambda tensor: natural(tensor.name))


def _refuse_source(model: Model, output: Path) -> None:
    """The output replaces nothing that it is made from."""
    source, target = model.path.resolve(), output.resolve()
    if target == source or target in source.parents:
        raise PlanError(f"{output} holds the model itself", hint="choose another name with -o")
