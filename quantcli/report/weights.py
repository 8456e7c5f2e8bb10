"""Streams a model's weights once and measures every tensor, in bounded memory.

Work is cut into slabs of rows of about four megabytes as stored, which threads take in the order
of the tensors; a slab's rows are dropped as soon as they are measured. Results are merged in the
slabs' own order, so that the numbers do not depend on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats import FORMATS, get_format
from quantcli.report.stats import WeightStats, empty_stats, measure_rows
from quantcli.types import Event, Progress

_SLAB_BYTES = 4 << 20

ReadRows = Callable[[int, int], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A tensor to measure; ``read`` gives rows as floats, or as uint8 blocks of ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    read: ReadRows

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows, with the leading axes flattened."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Measured(Event):
    """The work is done: the statistics by tensor name, in the order of the sources."""

    stats: Mapping[str, WeightStats]


def measure_weights(sources: Sequence[WeightSource], threads: int) -> Iterator[Event]:
    """Measure every source, yielding `Progress` and at last `Measured`.

    SourceError when a file ends early or a tensor's blocks cannot be decoded.
    """
    total = sum(source.nbytes for source in sources)
    waiting = deque((source, start, stop) for source in sources for start, stop in _cuts(source))
    parts: dict[tuple[str, int], WeightStats] = {}
    running: dict[Future[WeightStats], tuple[WeightSource, int, int]] = {}
    done = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="measure") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < 2 * threads:
                    slab = waiting.popleft()
                    running[pool.submit(_measure_slab, *slab)] = slab
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    source, start, stop = running.pop(future)
                    parts[source.name, start] = future.result()
                    done += source.nbytes * (stop - start) // max(1, source.rows)
                    yield Progress(min(done, total), total, source.name)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    yield Measured({source.name: _join(source, parts) for source in sources})


def _cuts(source: WeightSource) -> Iterator[tuple[int, int]]:
    row_bytes = max(1, source.nbytes // max(1, source.rows))
    step = max(1, _SLAB_BYTES // row_bytes)
    for start in range(0, source.rows, step):
        yield start, min(start + step, source.rows)


def _measure_slab(source: WeightSource, start: int, stop: int) -> WeightStats:
    rows = source.read(start, stop)
    return measure_rows(_decode(source, rows) if rows.dtype == np.uint8 else rows)


def _join(source: WeightSource, parts: Mapping[tuple[str, int], WeightStats]) -> WeightStats:
    total = empty_stats(source.columns)
    for start, _ in _cuts(source):
        total = total.merge(parts[source.name, start])
    return total


def _decode(source: WeightSource, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Blocks as float32: with our kernels, or with the gguf library's for formats it alone has."""
    if source.dtype in FORMATS:
        from quantcli.formats import native

        return native.decode(get_format(source.dtype), blocks)
    from gguf import GGMLQuantizationType, quants

    try:
        decoded = quants.dequantize(blocks, GGMLQuantizationType[source.dtype])
    except (KeyError, NotImplementedError) as error:
        raise SourceError(
            f"tensor {source.name!r} is stored as {source.dtype}, which cannot be decoded",
            hint="leave it out with --filter",
        ) from error
    return np.asarray(decoded, dtype=np.float32)
