"""The one loop: slabs of rows are read, encoded and written at their final offsets.

A slab is a run of rows of one matrix, about four megabytes as stored, whatever the tensor's size;
threads take slabs from one queue across all tensors, so a giant embedding and thousands of small
experts keep them equally busy, and memory is a few slabs per thread. The header goes first, the
files get their names last. The output's bytes depend on the model and the recipe alone.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantcli import __version__
from quantcli.artifacts.atomic import AtomicFiles, refuse_existing
from quantcli.artifacts.gguf_container import (
    Layout,
    TensorEntry,
    lay_out,
    shard_metadata,
    shard_paths,
)
from quantcli.errors import PlanError, UsageError, WeightError
from quantcli.formats import FORMATS, get_format, native
from quantcli.model import Model
from quantcli.plan.budget import check_disk, peak_memory, plan_split
from quantcli.plan.planner import Plan, TensorPlan, make_plan
from quantcli.plan.recipe import Recipe
from quantcli.plan.recipe_file import dump_recipe
from quantcli.plan.size_text import parse_size
from quantcli.sources.imatrix import Importance
from quantcli.types import Event, MetaValue, OutputTensor, PackedType, Progress, text, u32

SLAB_BYTES = 4 << 20
"""Stored bytes of a slab. Part of the source digest's definition, so it never varies."""

_NO_DIGEST = "sha256:" + "0" * 64

_scratch = threading.local()
"""Each thread's buffer for encoded rows: a fresh one would cost a page fault for every 4 KB."""


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """The files are whole: their paths, and bytes and bits per weight of all together."""

    paths: tuple[Path, ...]
    nbytes: int
    bits_per_weight: float
    source_digest: str


Encoder = Callable[[TensorPlan, int, NDArray[Any]], NDArray[np.uint8]]
"""Packed rows of a tensor from a row on: takes the plan's line, that row and the rows as read."""


@dataclass(frozen=True)
class Job:
    """A decided quantization: everything but the weights has been read and checked."""

    model: Model
    plan: Plan
    importance: Importance | None
    metadata: Mapping[str, MetaValue]
    shards: Mapping[Path, tuple[TensorPlan, ...]]
    layouts: Mapping[Path, Layout]
    force: bool
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    """What makes the rows of a tensor, by its name, in place of the block format's own encoder."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that will be written."""
        return tuple(self.shards)

    @property
    def nbytes(self) -> int:
        """Exact size of all files together."""
        return sum(layout.size for layout in self.layouts.values())


class Encoded(Protocol):
    """Tensors that a method has encoded already."""

    def __contains__(self, name: str) -> bool:
        """Whether the tensor ``name`` is among them."""

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Its packed rows ``start:stop``, uint8 of shape (stop - start, row bytes)."""


@dataclass(frozen=True, slots=True)
class _Slab:
    item: TensorPlan
    start: int
    stop: int
    path: Path
    offset: int


def default_threads() -> int:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def default_output(model: Model, recipe: Recipe) -> Path:
    """``NAME-TYPE.gguf`` in the current folder, NAME being the repository's, folder's or file's."""
    name = model.repo.rpartition("/")[2] if model.repo else model.path.resolve().name
    return Path(f"{name.removesuffix('.gguf')}-{recipe.type}.gguf")


def prepare(
    model: Model,
    recipe: Recipe,
    output: Path,
    *,
    importance: Importance | None = None,
    plan: Plan | None = None,
    force: bool = False,
    check: bool = True,
) -> Job:
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
    limit = parse_size(recipe.split_max_size) if recipe.split_max_size else None
    groups = plan_split(plan, limit) if limit else [list(plan.items)]
    paths = shard_paths(output, len(groups))
    metadata = _describe(model, plan, importance)
    shards = {path: tuple(group) for path, group in zip(paths, groups, strict=True)}
    layouts = _lay_out(metadata, shards)
    job = Job(model, plan, importance, metadata, shards, layouts, force)
    if check:
        refuse_existing(job.paths, force=force)
        check_disk(job.nbytes, output.parent)
    return job


def add_metadata(job: Job, keys: Mapping[str, MetaValue]) -> Job:
    """The same job with more key-values in its files."""
    metadata = {**job.metadata, **keys}
    return replace(job, metadata=metadata, layouts=_lay_out(metadata, job.shards))


def threads_within(job: Job, threads: int | None, max_memory: int | None) -> int:
    """How many threads may work so that resident memory stays below ``max_memory`` bytes.

    PlanError when one thread alone needs more.
    """
    wanted = threads or default_threads()
    if max_memory is None:
        return wanted
    for count in range(wanted, 0, -1):
        if peak_memory(job.plan, count, SLAB_BYTES) <= max_memory:
            return count
    needed = peak_memory(job.plan, 1, SLAB_BYTES)
    raise PlanError(
        f"{job.model.label} needs up to {needed:,} bytes of memory even on one thread, "
        f"more than the {max_memory:,} allowed",
        hint=f"--max-memory {-(-needed // 10**6)}M is enough",
    )


def execute(
    job: Job,
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    encoded: Encoded | None = None,
) -> Iterator[Event]:
    """Do a job, yielding notes and progress, at last `Finished`.

    ``threads`` defaults to the processors, and to as many as fit into ``max_memory`` bytes.
    Tensors in ``encoded`` are taken from there. Whatever ends the iteration early (an error, an
    interrupt, closing the generator) leaves no file under a final name and an existing one
    untouched.
    """
    workers = threads_within(job, threads, max_memory)
    yield from job.model.notes
    yield from job.plan.notes
    sizes = {path: layout.size for path, layout in job.layouts.items()}
    with AtomicFiles(sizes, force=job.force) as files:
        for path, layout in job.layouts.items():
            files.write(path, 0, layout.header)
        leaves: dict[tuple[str, int], bytes] = {}
        yield from _encode_all(job, files, workers, leaves, encoded)
        digest = combine_digest(job.model, leaves)
        metadata = {**job.metadata, "quantcli.source.digest": text(digest)}
        for path, layout in _lay_out(metadata, job.shards).items():
            files.write(path, 0, layout.header)
        files.publish()
    yield Finished(job.paths, job.nbytes, job.plan.bits_per_weight, digest)


def _encode_all(
    job: Job,
    files: AtomicFiles,
    threads: int,
    leaves: dict[tuple[str, int], bytes],
    encoded: Encoded | None,
) -> Iterator[Progress]:
    model = job.model
    total = sum(model.stored_bytes(item.tensor) for item in job.plan.items)
    done = 0
    waiting = deque(_slabs(job))
    running: dict[Future[bytes], _Slab] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < 2 * threads:
                    slab = waiting.popleft()
                    running[pool.submit(_encode_slab, job, files, slab, encoded)] = slab
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    slab = running.pop(future)
                    leaves[slab.item.tensor.name, slab.start] = future.result()
                    tensor = slab.item.tensor
                    done += model.stored_bytes(tensor) * (slab.stop - slab.start) // tensor.rows
                    yield Progress(min(done, total), total, tensor.name)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _slabs(job: Job) -> Iterator[_Slab]:
    for path, items in job.shards.items():
        for item in items:
            offset = job.layouts[path].offsets[item.tensor.name]
            row_bytes = item.nbytes // max(1, item.tensor.rows)
            for start, stop in cut_rows(job.model, item.tensor):
                yield _Slab(item, start, stop, path, offset + start * row_bytes)


def cut_rows(model: Model, tensor: OutputTensor) -> Iterator[tuple[int, int]]:
    """Row ranges of about SLAB_BYTES that never cross from one stacked matrix into the next."""
    stored = max(1, model.stored_bytes(tensor) // max(1, tensor.rows))
    if tensor.dtype == "F8_E4M3":
        # The scales beside the codes do not count, lest digests change with them.
        stored = max(1, tensor.columns)
    elif isinstance(tensor.dtype, PackedType):
        # Its rows come as float32, whatever they take in the file.
        stored = 4 * max(1, tensor.columns)
    step = max(1, SLAB_BYTES // stored)
    matrix = tensor.shape[-2] if len(tensor.shape) > 2 else tensor.rows
    for first in range(0, tensor.rows, max(1, matrix)):
        for start in range(first, first + matrix, step):
            yield start, min(start + step, first + matrix)


def _encode_slab(job: Job, files: AtomicFiles, slab: _Slab, encoded: Encoded | None) -> bytes:
    """Read, encode and write one slab; returns the SHA-256 of the rows as stored."""
    tensor = slab.item.tensor
    rows = job.model.read_rows(tensor, slab.start, slab.stop)
    leaf = hashlib.sha256(rows.view(np.uint8).data).digest()
    if encoded is not None and tensor.name in encoded:
        packed = encoded.read_rows(tensor.name, slab.start, slab.stop)
        files.write(slab.path, slab.offset, packed.data)
        return leaf
    if tensor.name in job.encoders:
        packed = job.encoders[tensor.name](slab.item, slab.start, rows)
        files.write(slab.path, slab.offset, packed.data)
        return leaf
    if tensor.dtype == slab.item.format and rows.dtype == np.uint8:
        files.write(slab.path, slab.offset, rows.data)
        return leaf
    if rows.dtype == np.uint8 and tensor.dtype in FORMATS:
        rows = native.decode(get_format(tensor.dtype), rows)
    weights = _importance_of(job, slab)
    fmt = get_format(slab.item.format)
    out = None if tensor.dtype == fmt.name else _buffer(len(rows), fmt.row_bytes(tensor.columns))
    try:
        blocks = native.encode(fmt, rows, weights, out=out)
    except native.UnencodableError as refused:
        raise _locate(job.model, slab, refused) from refused
    files.write(slab.path, slab.offset, blocks.data)
    return leaf


def _buffer(rows: int, row_bytes: int) -> NDArray[np.uint8]:
    """A packed array of the thread's own, until it asks for the next one."""
    held: NDArray[np.uint8] = getattr(_scratch, "held", np.empty(0, np.uint8))
    if held.size < rows * row_bytes:
        held = _scratch.held = np.empty(rows * row_bytes, np.uint8)
    return held[: rows * row_bytes].reshape(rows, row_bytes)


def _importance_of(job: Job, slab: _Slab) -> NDArray[np.float32] | None:
    if job.importance is None or not slab.item.importance:
        return None
    tensor = slab.item.tensor
    # The legacy form stores the weights of a stack's matrices as one row.
    matrices = tensor.shape[-3] if len(tensor.shape) > 2 else 1
    weights = job.importance.weights(tensor.name, matrices, tensor.columns)
    return None if weights is None else weights[slab.start * matrices // tensor.rows]


def _locate(model: Model, slab: _Slab, refused: native.UnencodableError) -> WeightError:
    """The refusal in terms of the stored tensor: its file, its name, its own row and column."""
    info, row, column = model.origin(slab.item.tensor, slab.start + refused.row, refused.column)
    hint = "a wider type can hold it, such as --tensor-type with F32"
    if not math.isfinite(refused.value):
        hint = "the checkpoint is damaged, or its training had diverged; get it again"
    return WeightError(
        f"{info.file}: tensor {info.name}: the weight {refused.value!r} at row {row}, "
        f"column {column} {refused.reason}",
        hint=hint,
    )


def _lay_out(
    metadata: Mapping[str, MetaValue], shards: Mapping[Path, Sequence[TensorPlan]]
) -> dict[Path, Layout]:
    tensors = sum(map(len, shards.values()))
    layouts = {}
    for index, (path, items) in enumerate(shards.items()):
        entries = [
            TensorEntry(item.tensor.name, item.tensor.shape, item.type_id, item.nbytes)
            for item in items
        ]
        layouts[path] = lay_out(shard_metadata(metadata, index, len(shards), tensors), entries)
    return layouts


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
    recipe = plan.recipe
    if recipe.imatrix:
        recipe = replace(recipe, imatrix=Path(recipe.imatrix).name)
    keys["quantcli.recipe"] = text(dump_recipe(recipe))
    if model.repo:
        keys["quantcli.source.repo"] = text(model.repo)
    if model.revision:
        keys["quantcli.source.revision"] = text(model.revision)
    keys["quantcli.source.digest"] = text(_NO_DIGEST)
    return keys


def combine_digest(model: Model, leaves: Mapping[tuple[str, int], bytes]) -> str:
    """SHA-256 over every tensor's name, dtype and shape and its slabs' own SHA-256."""
    whole = hashlib.sha256()
    for tensor in model.tensors:
        whole.update(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        for start, _ in cut_rows(model, tensor):
            whole.update(leaves[tensor.name, start])
    return f"sha256:{whole.hexdigest()}"
