"""Threads for kernels that drop the GIL: rows are shared out, each row's result its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Workers:
    """Threads for kernels that drop the GIL."""

    count: int = 1
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    def run(self, rows: int, task: Callable[[int, int], None]) -> None:
        """Call ``task(start, stop)`` for shares of the rows, in multiples of 16."""
        step = max(16, -(-rows // (16 * self.count)) * 16)
        shares = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        if self._pool is None or len(shares) == 1:
            for share in shares:
                task(*share)
            return
        for done in [self._pool.submit(task, *share) for share in shares]:
            done.result()


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """`Workers` of ``count`` threads for the time of the block."""
    if count <= 1:
        yield Workers()
        return
    with ThreadPoolExecutor(count, thread_name_prefix="round") as pool:
        yield Workers(count, pool)
