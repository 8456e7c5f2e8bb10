"""Stored rows that several outputs are made of, read once although each cuts them otherwise.

A GGUF has llama's q and k in another order of rows than a checkpoint, a model folder is cut at
whole groups of rows, and a matrix that is stored transposed is read by columns. So what one output
reads at a time may be parts of what another does. Behind a `SharedReads` every stored tensor is
read in slabs of its own, and the last few are held: the outputs ask for a tensor's rows in about
their order, so that all have had a slab long before it goes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts import slabs
from quantcli.formats import FORMATS
from quantcli.interrupts import wait_for
from quantcli.layouts.base import ROWS
from quantcli.sources.remote_file import CONNECTIONS
from quantcli.types import BlockStore, PackedType, TensorInfo, TensorStore, row_count

if TYPE_CHECKING:
    from quantcli.artifacts.write import Artifact

_MORE = 4
"""Slabs that are held beside one for each thread that asks: two outputs' borders, both sides."""

_Key = tuple[str, bool, int]
"""A tensor, whether its columns are read, and the first row or column."""


def reads_are_shared(artifacts: Sequence[Artifact]) -> bool:
    """Whether several read the same tensors, and not all alike.

    GGUFs of one model do; model folders read stored tensors, each in the parts that it needs.
    """
    first = artifacts[0].source
    others = any(artifact.source is not first for artifact in artifacts)
    return len(artifacts) > 1 and (others or first is artifacts[0].tensor_store)


def slab_readers(threads: int, *, remote: bool) -> int:
    """How many threads read slabs where ``threads`` encode them."""
    return threads + (CONNECTIONS if remote else 0)


def shared_bytes(store: TensorStore, readers: int) -> int:
    """Memory that what is held for ``readers`` takes at most."""
    return (readers + _MORE) * max((_largest(info) for info in store.tensors.values()), default=0)


def _largest(info: TensorInfo) -> int:
    """Bytes of a slab's values as they are read."""
    rows, row_bytes = row_count(info.shape), _row_bytes(info)
    # E4M3 comes as float32, with its scales.
    return min(rows, _step(row_bytes)) * row_bytes * (4 if info.dtype == "F8_E4M3" else 1)


def _row_bytes(info: TensorInfo) -> int:
    """What a row counts for, as where a GGUF's slabs are cut."""
    columns = info.shape[-1] if info.shape else 1
    if info.dtype == "F8_E4M3":
        return columns
    if isinstance(info.dtype, PackedType) and info.dtype not in FORMATS:
        return 4 * columns
    return info.nbytes // max(1, row_count(info.shape))


def _step(row_bytes: int) -> int:
    """Lines of a slab: never fewer than a model folder asks for at a time."""
    return -(-slabs.SLAB_BYTES // max(1, row_bytes) // ROWS) * ROWS


class SharedReads:
    """A `TensorStore` that reads from ``store``, holding what ``readers`` threads have in common.

    What it gives is not to be changed; NumPy refuses it.
    """

    def __init__(self, store: TensorStore, readers: int) -> None:
        self._inner = store
        self._most = readers + _MORE
        self._held: OrderedDict[_Key, Future[NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def of(store: TensorStore, readers: int) -> SharedReads:
        """One for a store, whatever else that can."""
        return (SharedBlockReads if isinstance(store, BlockStore) else SharedReads)(store, readers)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by name."""
        return self._inner.tensors

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop`` as `TensorStore` has them."""
        info = self.tensors[name]
        rows = row_count(info.shape)
        return self._read(self._inner.read_rows, (name, False), start, stop, (rows, rows))

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Columns ``start:stop``, transposed, as `TensorStore` has them."""
        shape = self.tensors[name].shape
        if len(shape) < 2:
            return self._inner.read_columns(name, start, stop)
        size = row_count(shape) // max(1, shape[-2]) * shape[-1], shape[-1]
        return self._read(self._inner.read_columns, (name, True), start, stop, size)

    def check_unchanged(self) -> None:
        """SourceError where what is read is elsewhere and has changed meanwhile."""
        check: Callable[[], None] | None = getattr(self._inner, "check_unchanged", None)
        if check is not None:
            check()

    def close(self) -> None:
        """Let go of what is held; the files stay open, which are another's."""
        with self._lock:
            self._held.clear()

    def _read(
        self, read: Callable[[str, int, int], NDArray[Any]], what: tuple[str, bool],
        start: int, stop: int, size: tuple[int, int],
    ) -> NDArray[Any]:  # fmt: skip
        """Lines ``start:stop`` of ``size``: how many there are, and in each of its matrices."""
        name, by_columns = what
        info = self.tensors[name]
        row_bytes = _row_bytes(info)
        if by_columns:
            row_bytes = row_bytes * info.shape[-2] // max(1, info.shape[-1])
        step = _step(row_bytes)
        parts = []
        at = start
        while at < stop:
            matrix = at // size[1] * size[1]
            first = matrix + (at - matrix) // step * step
            last = min(first + step, matrix + size[1], size[0])
            if last <= at:
                break
            lines = self._slab(read, (name, by_columns, first), last)
            parts.append(lines[at - first : stop - first])
            at = last
        if not parts or at < stop:
            # What is empty or outside of the tensor: as the store has it.
            return read(name, start, stop)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _slab(
        self, read: Callable[[str, int, int], NDArray[Any]], key: _Key, stop: int
    ) -> NDArray[Any]:
        with self._lock:
            future = self._held.get(key)
            mine = future is None
            if future is None:
                future = self._held[key] = Future()
                while len(self._held) > self._most:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
        if mine:
            try:
                lines = read(key[0], key[2], stop)
                lines.flags.writeable = False
                future.set_result(lines)
            except BaseException as error:
                with self._lock:
                    self._held.pop(key, None)
                future.set_exception(error)
                raise
        return wait_for(future)


class SharedBlockReads(SharedReads):
    """The same of a `BlockStore`, whose blocks are read each time."""

    _inner: Any

    @property
    def blocks(self) -> Mapping[str, str]:
        """The block format of each stack that is stored in blocks."""
        found: Mapping[str, str] = self._inner.blocks
        return found

    def read_blocks(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Packed rows of columns of such a stack."""
        rows: NDArray[np.uint8] = self._inner.read_blocks(name, start, stop)
        return rows
