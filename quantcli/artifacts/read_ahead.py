"""Slabs of a model on the network, read before their turn comes.

Encoding a slab takes a processor, fetching one takes patience: while a few slabs are encoded, the
next ones are on their way over several connections. What has come and waits is bounded by bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from quantcli.interrupts import wait_for
from quantcli.sources.remote_file import CONNECTIONS

AHEAD_BYTES = 2 * CONNECTIONS * (4 << 20)
"""Stored bytes of slabs that are being read or wait for their turn: two for each connection."""

Read = Callable[[], NDArray[Any]]


class ReadAhead:
    """Gives each of ``reads`` what it reads, whichever is asked for first; a context manager.

    ``sizes`` are the bytes that each reads. Each may be asked for once, about in their order.
    """

    def __init__(self, reads: Sequence[Read], sizes: Sequence[int]) -> None:
        self._reads, self._sizes = reads, sizes
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="ahead")
        self._begun: dict[int, Future[NDArray[Any]]] = {}
        self._next = 0
        self._held = 0
        self._lock = threading.Lock()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self, index: int) -> NDArray[Any]:
        """The rows of read number ``index``; raises what reading them raised."""
        with self._lock:
            while self._next <= index:
                self._begin()
            future = self._begun.pop(index)
        try:
            return wait_for(future)
        finally:
            with self._lock:
                self._held -= self._sizes[index]
                while self._next < len(self._reads) and self._held < AHEAD_BYTES:
                    self._begin()

    def _begin(self) -> None:
        index, self._next = self._next, self._next + 1
        self._held += self._sizes[index]
        self._begun[index] = self._pool.submit(self._reads[index])
