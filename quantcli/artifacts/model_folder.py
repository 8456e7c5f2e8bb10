"""The loop for model folders: slabs of rows are read, quantized and written at their offsets.

As for a GGUF file, every offset is known before a weight is read, threads take slabs from one
queue across all tensors, memory is a few slabs for each thread, and the output's bytes depend
on the model and the recipe alone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.atomic_folder import AtomicFolder
from quantcli.artifacts.folder_job import FolderJob, folder_threads, make_settings
from quantcli.artifacts.gguf_file import SLAB_BYTES, Finished
from quantcli.artifacts.nearest_codes import CodeSource, RoundToNearest, column_weights
from quantcli.errors import WeightError
from quantcli.formats import get_format, native
from quantcli.layouts.base import DTYPES as ARRAY_DTYPES
from quantcli.layouts.base import ROWS, Patch
from quantcli.plan.folders import Copy, Item
from quantcli.plan.linear_layers import natural
from quantcli.types import Event, Progress


@dataclass(frozen=True, slots=True)
class _Slab:
    item: Item | Copy
    start: int
    stop: int

    @property
    def place(self) -> tuple[str, int, int]:
        """Its own place among the stored tensors."""
        return self.item.source, self.item.first, self.start


def execute_folder(
    job: FolderJob,
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    source: CodeSource | None = None,
) -> Iterator[Event]:
    """Do a job, yielding notes and progress, at last `Finished`, as for a GGUF file.

    ``source`` gives the codes in place of rounding to nearest.
    """
    workers = folder_threads(job, threads, max_memory)
    if source is None and job.plan.scheme is not None:
        source = RoundToNearest(job.plan, job.model.store, job.importance, SLAB_BYTES)
    yield from job.plan.notes
    with AtomicFolder(job.path, job.sizes, force=job.force) as folder:
        for name, layout in job.layouts.items():
            folder.write(name, 0, layout.header)
        leaves: dict[tuple[str, int, int], bytes] = {}
        yield from _run_all(job, folder, source, workers, leaves)
        digest = _digest(job, leaves)
        settings = make_settings(job.model, job.plan, job.packing, job.tensors, digest)
        for name, body in {**settings, **job.files}.items():
            folder.write(name, 0, body)
        folder.publish()
    yield Finished((job.path,), job.nbytes, job.bits_per_weight, digest)


def _run_all(
    job: FolderJob,
    folder: AtomicFolder,
    source: CodeSource | None,
    threads: int,
    leaves: dict[tuple[str, int, int], bytes],
) -> Iterator[Progress]:
    waiting = deque(_slabs(job))
    total = sum(_stored_bytes(job, slab) for slab in waiting)
    done = 0
    running: dict[Future[bytes], _Slab] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < 2 * threads:
                    slab = waiting.popleft()
                    running[pool.submit(_work, job, folder, source, slab)] = slab
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    slab = running.pop(future)
                    leaves[slab.place] = future.result()
                    done += _stored_bytes(job, slab)
                    yield Progress(done, total, slab.item.source)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _slabs(job: FolderJob) -> Iterator[_Slab]:
    parts: list[Item | Copy] = [*job.plan.items, *job.plan.copies]
    for item in sorted(parts, key=lambda part: (natural(part.source), part.first)):
        info = job.model.store.tensors[item.source]
        row_bytes = max(1, info.nbytes * item.columns // max(1, info.elements))
        step = max(ROWS, SLAB_BYTES // row_bytes // ROWS * ROWS)
        for start in range(0, item.rows, step):
            yield _Slab(item, start, min(start + step, item.rows))


def _stored_bytes(job: FolderJob, slab: _Slab) -> int:
    info = job.model.store.tensors[slab.item.source]
    values = (slab.stop - slab.start) * slab.item.columns
    return info.nbytes * values // max(1, info.elements)


def _work(job: FolderJob, folder: AtomicFolder, source: CodeSource | None, slab: _Slab) -> bytes:
    """Read, quantize and write one slab; returns the SHA-256 of the rows as stored."""
    item = slab.item
    rows = _read(job, slab)
    leaf = hashlib.sha256(rows.view(np.uint8).data).digest()
    try:
        if isinstance(item, Copy):
            _write(job, folder, Patch(item.name, _cast(rows, item.dtype), item.row + slab.start))
        elif job.packing is None or job.plan.scheme is None:
            _write(job, folder, _fake(job, item, slab.start, rows))
        elif source is not None:
            coded = source(item.matrix, slab.start, rows)
            grid = job.plan.scheme.grid
            for patch in job.packing.place(item.matrix, grid, slab.start, coded):
                _write(job, folder, patch)
    except native.UnencodableError as refused:
        raise _locate(job, slab, refused) from refused
    return leaf


def _read(job: FolderJob, slab: _Slab) -> NDArray[Any]:
    store, item = job.model.store, slab.item
    start, stop = item.first + slab.start, item.first + slab.stop
    if isinstance(item, Item) and item.matrix.transpose:
        return store.read_columns(item.source, start, stop)
    return store.read_rows(item.source, start, stop)


def _fake(job: FolderJob, item: Item, start: int, rows: NDArray[Any]) -> Patch:
    """The rows through a block format and back."""
    fmt, matrix = get_format(item.format or "F32"), item.matrix
    weights = column_weights(job.importance, matrix, item.importance)
    values = _cast(native.decode(fmt, native.encode(fmt, rows, weights)), item.dtype)
    if matrix.transpose:
        return Patch(matrix.source, np.ascontiguousarray(values.T), column=start)
    return Patch(matrix.source, values, matrix.first + start)


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


def _write(job: FolderJob, folder: AtomicFolder, patch: Patch) -> None:
    name, offset, declared = job.tensors[patch.tensor]
    width = declared.shape[-1] if declared.shape else 1
    size = patch.values.itemsize
    at = offset + (patch.row * width + patch.column) * size
    values = np.ascontiguousarray(patch.values)
    data = values.reshape(values.shape[0], -1).view(np.uint8)
    if values.shape[1] == width:
        folder.write(name, at, data.data)
        return
    for row in data:
        folder.write(name, at, row.data)
        at += width * size


def _locate(job: FolderJob, slab: _Slab, refused: native.UnencodableError) -> WeightError:
    name, first, start = slab.place
    row, column = first + start + refused.row, refused.column
    if isinstance(slab.item, Item) and slab.item.matrix.transpose:
        row, column = column, row
    if not np.isfinite(refused.value):
        hint = "the checkpoint is damaged, or its training had diverged; get it again"
    elif isinstance(slab.item, Copy):
        hint = "--dtype F32 holds any weight"
    elif job.plan.scheme is None:
        hint = "a wider type can hold it, such as --tensor-type with F32"
    else:
        hint = f"--keep '{slab.item.matrix.module}' leaves its module as it is"
    return WeightError(
        f"{job.model.store.tensors[name].file}: tensor {name}: the weight {refused.value!r} at "
        f"row {row}, column {column} {refused.reason}",
        hint=hint,
    )


def _digest(job: FolderJob, leaves: Mapping[tuple[str, int, int], bytes]) -> str:
    """SHA-256 over every stored tensor's name, dtype and shape and its slabs' own SHA-256."""
    whole = hashlib.sha256()
    seen = ""
    for place in sorted(leaves, key=lambda place: (natural(place[0]), place[1:])):
        info = job.model.store.tensors[place[0]]
        if info.name != seen:
            whole.update(f"{info.name}\0{info.dtype}\0{info.shape}\0".encode())
            seen = info.name
        whole.update(leaves[place])
    return f"sha256:{whole.hexdigest()}"
