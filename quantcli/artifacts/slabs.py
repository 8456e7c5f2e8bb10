"""Slabs: runs of a tensor's rows, about four megabytes as stored, that threads work on.

Threads take slabs from one queue across all tensors, so a giant embedding and thousands of small
experts keep them equally busy, and memory is a few slabs for each thread. Whoever reads weights
from end to end (a writer, a check, statistics) cuts and schedules them here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from quantcli.errors import WeightError
from quantcli.formats import FORMATS
from quantcli.formats.native import UnencodableError
from quantcli.model import Model
from quantcli.types import OutputTensor, PackedType, Progress, TensorInfo

T = TypeVar("T")

SLAB_BYTES = 4 << 20
"""Stored bytes of a slab. Part of the source digest's definition, so it never varies."""

UNFINISHED = "sha256:" + "0" * 64
"""Stands where the digest will, which is known last."""


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows ``start:stop`` of a tensor, which take ``nbytes`` as stored."""

    tensor: str
    start: int
    stop: int
    nbytes: int


def cut_slabs(
    tensor: str,
    rows: range,
    nbytes: int,
    *,
    row_bytes: int | None = None,
    matrix: int | None = None,
    multiple: int = 1,
) -> Iterator[Slab]:
    """The slabs of ``rows``, which take ``nbytes`` together.

    ``row_bytes`` is what a row counts for, if not its share of ``nbytes``. No slab crosses from one
    stacked matrix of ``matrix`` rows into the next; each has a ``multiple`` of rows but the last.
    """
    count = max(1, len(rows))
    if row_bytes is None:
        row_bytes = nbytes // count
    step = max(multiple, SLAB_BYTES // max(1, row_bytes) // multiple * multiple)
    matrix = max(1, matrix or len(rows))
    for first in range(0, len(rows), matrix):
        for start in range(first, first + matrix, step):
            stop = min(start + step, first + matrix)
            share = nbytes * stop // count - nbytes * start // count
            yield Slab(tensor, rows.start + start, rows.start + stop, share)


def cut_tensor(model: Model, tensor: OutputTensor) -> Iterator[Slab]:
    """The slabs of a model's tensor, of which the digest of the source is made."""
    row_bytes = None
    if tensor.dtype == "F8_E4M3":
        # The scales beside the codes do not count, lest digests change with them.
        row_bytes = tensor.columns
    elif isinstance(tensor.dtype, PackedType) and tensor.dtype not in FORMATS:
        # Its rows come as float32, whatever they take in the file.
        row_bytes = 4 * tensor.columns
    matrix = tensor.shape[-2] if len(tensor.shape) > 2 else None
    nbytes = model.stored_bytes(tensor)
    return cut_slabs(tensor.name, range(tensor.rows), nbytes, row_bytes=row_bytes, matrix=matrix)


def work_slabs(
    tasks: Sequence[tuple[Slab, Callable[[], T]]], threads: int
) -> Generator[Progress, None, list[T]]:
    """Do the task of each slab, yielding progress; returns their results in order.

    Slabs are begun in order and end in any. An error, or closing the generator, waits for the
    tasks that run and begins no other.
    """
    total = sum(slab.nbytes for slab, _ in tasks)
    done = 0
    results: dict[int, T] = {}
    waiting = iter(enumerate(tasks))
    running: dict[Future[T], int] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="slab") as pool:
        try:
            while True:
                for index, (_, task) in islice(waiting, 2 * threads - len(running)):
                    running[pool.submit(task)] = index
                if not running:
                    return [results[index] for index in range(len(tasks))]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    results[index] = future.result()
                    done += tasks[index][0].nbytes
                    yield Progress(done, total, tasks[index][0].tensor)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def hash_rows(rows: NDArray[Any]) -> bytes:
    """SHA-256 of a slab's rows as stored: a leaf of the source digest."""
    return hashlib.sha256(rows.view("u1").data).digest()


def combine_digest(
    tensors: Iterable[tuple[TensorInfo | OutputTensor, Iterable[bytes]]],
) -> str:
    """SHA-256 over every tensor's name, dtype and shape and its slabs' own SHA-256."""
    whole = hashlib.sha256()
    for tensor, leaves in tensors:
        whole.update(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        for leaf in leaves:
            whole.update(leaf)
    return f"sha256:{whole.hexdigest()}"


def digest_model(model: Model, leaves: Mapping[Slab, bytes]) -> str:
    """The digest of the weights of ``model``, in the order of its tensors."""
    return combine_digest(
        (tensor, (leaves[slab] for slab in cut_tensor(model, tensor))) for tensor in model.tensors
    )


def refuse_weight(
    refused: UnencodableError,
    file: Path,
    tensor: str,
    row: int,
    column: int,
    *,
    wider: str,
    damaged: str = "the checkpoint is damaged, or its training had diverged; get it again",
) -> WeightError:
    """The error for a weight that its format does not hold, where it is stored.

    The hint is ``wider`` for a weight that another format holds, else ``damaged``.
    """
    return WeightError(
        f"{file}: tensor {tensor}: the weight {refused.value!r} at row {row}, "
        f"column {column} {refused.reason}",
        hint=wider if math.isfinite(refused.value) else damaged,
    )
