"""Streams a model's weights once and measures every tensor, in bounded memory.

A slab's rows are dropped as soon as they are measured. Results are merged in the slabs' own order,
so that the numbers do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.slabs import Slab, cut_slabs, work_slabs
from quantcli.errors import SourceError
from quantcli.formats import FORMATS, get_format
from quantcli.report.stats import WeightStats, empty_stats, measure_rows
from quantcli.types import Event

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
class WeightStatsDone(Event):
    """The work is done: the statistics by tensor name, in the order of the sources."""

    stats: Mapping[str, WeightStats]


def measure_weights(sources: Sequence[WeightSource], threads: int) -> Iterator[Event]:
    """Measure every source, yielding `Progress` and at last `WeightStatsDone`.

    SourceError when a file ends early or a tensor's blocks cannot be decoded.
    """
    tasks = [
        (slab, partial(_measure_slab, source, slab))
        for source in sources
        for slab in cut_slabs(source.name, range(source.rows), source.nbytes)
    ]
    parts = yield from work_slabs(tasks, threads)
    stats = {source.name: empty_stats(source.columns) for source in sources}
    for (slab, _), part in zip(tasks, parts, strict=True):
        stats[slab.tensor] = stats[slab.tensor].merge(part)
    yield WeightStatsDone(stats)


def _measure_slab(source: WeightSource, slab: Slab) -> WeightStats:
    rows = source.read(slab.start, slab.stop)
    return measure_rows(_decode(source, rows) if rows.dtype == np.uint8 else rows)


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
