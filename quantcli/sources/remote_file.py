"""A file that is read by ranges over a network, as `StoredFile` is from a disk.

Long reads are cut into parts that come over several connections at once. Short ones are served
from blocks that are kept for a while, since headers, scales and zero points are read in crumbs.
Columns of a packed matrix, which a disk reads line by line, come as whole lines.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.interrupts import left_behind, wait_for
from quantcli.sources.address import Address
from quantcli.sources.connections import Connections
from quantcli.sources.files import StoredFile
from quantcli.sources.patience import Patience

CONNECTIONS = 8
"""Requests at a time."""

_BLOCK = 1 << 16
_FIRST_READ = 1 << 18
"""Bytes of the first request: the whole header of most shards, the start of any GGUF's."""
_PART = 4 << 20
"""Bytes of a part of a long read."""
KEPT_BYTES = 64 << 20
"""Bytes of short reads, and of whole lines, that are kept for the next ones."""
_LONGEST_LINES = 256 << 20
"""Bytes of the longest matrix that is read as a whole for its columns."""


class Ranges(Protocol):
    """Where the bytes of one file come from."""

    def begin(self, count: int) -> tuple[bytes, int, str]:
        """The first ``count`` bytes or fewer, the file's size, and what marks this version of it.

        SourceError where the file is not there or may not be read.
        """

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes at ``offset``; SourceError when they cannot be had."""

    def check_unchanged(self) -> None:
        """SourceError where the file is not the one that was begun."""


class Place:
    """What the files of one model share: connections, patience, and what was read of late.

    ``owner`` is what has to stay as long as one of them.
    """

    def __init__(self, owner: object = None) -> None:
        self.owner = owner
        self.patience = Patience()
        self.connections = Connections(CONNECTIONS, "ranges")
        self._kept: OrderedDict[Hashable, tuple[Future[bytes], int]] = OrderedDict()
        self._held = 0
        self._files = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """A file of this place is opened."""
        with self._lock:
            self._files += 1

    def leave(self) -> None:
        """A file is closed; with the last one every wait for the network ends."""
        with self._lock:
            self._files -= 1
            if self._files > 0:
                return
        self.close()

    def keep(self, key: Hashable, nbytes: int, read: Callable[[], bytes]) -> bytes:
        """What ``read`` gives, once for all who ask while it is kept."""
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
            else:
                future: Future[bytes] = Future()
                self._kept[key] = future, nbytes
                self._held += nbytes
                while self._held > KEPT_BYTES and len(self._kept) > 1:
                    _, (_, freed) = self._kept.popitem(last=False)
                    self._held -= freed
        if known is not None:
            return wait_for(known[0])
        try:
            found = read()
        except BaseException as error:
            with self._lock:
                if self._kept.get(key, (None, 0))[0] is future:
                    del self._kept[key]
                    self._held -= nbytes
            future.set_exception(error)
            raise
        future.set_result(found)
        return found

    def close(self) -> None:
        """End every wait for the network."""
        self.patience.stop.set()
        self.connections.close()
        if self.connections.busy:
            left_behind.set()


class RemoteFile(StoredFile):
    """A file behind ``ranges``, of which only what is asked for is transferred."""

    is_remote = True

    def __init__(self, path: Address, ranges: Ranges, place: Place) -> None:
        self.path = path
        self._descriptor = -1
        self._ranges = ranges
        self._place = place
        self._closed = False
        place.enter()
        begun = place.connections.submit(partial(ranges.begin, _FIRST_READ))
        first, self.size, path.mark = wait_for(begun)
        path.mark, path.size = f"{self.size} {path.mark}", self.size
        for start in range(0, len(first), _BLOCK):
            block = first[start : start + _BLOCK]
            self._place.keep((path, start), len(block), partial(bytes, block))

    def fill(self, target: NDArray[Any], offset: int) -> None:
        """Fill a C-contiguous array with the bytes at ``offset``; SourceError when they end."""
        view = target.reshape(-1).view(np.uint8).data
        if offset + len(view) > self.size:
            raise SourceError(
                f"{self.path}: ends at byte {self.size}, "
                f"{offset + len(view) - max(offset, self.size)} bytes early"
            )
        if len(view) <= _FIRST_READ and (len(view) <= _BLOCK or offset + len(view) <= _FIRST_READ):
            self._fill_from_blocks(view, offset)
        else:
            self._fill_in_parts(view, offset)

    def read_block(
        self,
        offset: int,
        dtype: np.dtype[Any],
        width: int,
        rows: tuple[int, int],
        columns: tuple[int, int] | None = None,
    ) -> NDArray[Any]:
        """A rectangle of a matrix; see `StoredFile.read_block`.

        A range of columns is cut from whole lines, which are kept for the next range.
        """
        nbytes = (rows[1] - rows[0]) * width * dtype.itemsize
        if columns is None or columns[1] - columns[0] == width or nbytes > _LONGEST_LINES:
            return super().read_block(offset, dtype, width, rows, columns)
        start = offset + rows[0] * width * dtype.itemsize
        read = partial(self._read_range, start, nbytes)
        whole = self._place.keep((self.path, start, nbytes), nbytes, read)
        lines = np.frombuffer(whole, dtype).reshape(rows[1] - rows[0], width)
        return np.ascontiguousarray(lines[:, columns[0] : columns[1]])

    def _fill_in_parts(self, view: memoryview, offset: int) -> None:
        size = _PART if len(view) >= 2 * _PART else len(view)
        parts = [
            self._place.connections.submit(
                partial(self._ranges.fill, view[start : start + size], offset + start)
            )
            for start in range(0, len(view), size)
        ]
        for part in parts:
            wait_for(part)

    def _fill_from_blocks(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            start = (offset + done) // _BLOCK * _BLOCK
            count = min(_BLOCK, self.size - start)
            read = partial(self._read_range, start, count)
            block = self._place.keep((self.path, start), count, read)
            part = block[offset + done - start :][: len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)

    def _read_range(self, start: int, count: int) -> bytes:
        data = bytearray(count)
        self._fill_in_parts(memoryview(data), start)
        return bytes(data)

    def check_unchanged(self) -> None:
        """SourceError where the file is not the one that was opened."""
        self._ranges.check_unchanged()

    def close(self) -> None:
        """The last file that is closed ends the reading of all; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._place.leave()
