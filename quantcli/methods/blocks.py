"""A matrix of packed rows as columns of blocks, with its codes open to change.

`Coded` holds one `Parts` for each column of blocks, all rows together, so that a method can work
on 32 to 256 columns at once with plain matrix products. The native kernels are shared out over
threads by rows; each row's result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from quantcli import _native
from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.lattice import LATTICES, Lattice, Parts
from quantcli.formats.search import Codes


def has_lattice(format_name: str) -> bool:
    """Whether a method can choose the codes of this block format."""
    return format_name in LATTICES


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


@dataclass(frozen=True)
class Table:
    """A lattice's levels in rising order, for the kernels."""

    levels: Floats
    uniform: bool
    order: Codes
    """The lattice's own code of each level in rising order."""

    @classmethod
    def of(cls, lattice: Lattice) -> Table:
        """The table of ``lattice``; of equal levels the first code is taken."""
        levels, first = np.unique(lattice.levels, return_index=True)
        uniform = bool((np.diff(levels) == 1).all())
        return cls(levels.astype(np.float32), uniform, first.astype(np.int32))


PANEL = 256
"""Columns that the kernels take at once: one super-block, or several smaller blocks."""


class Coded:
    """Rows in a block format as `Parts` of panels of columns.

    A panel holds ``rows * blocks`` blocks, those of a row together. ``errors`` is weights less
    values, float32 (rows, columns), and is kept up to date.
    """

    def __init__(self, fmt: BlockFormat, rows: Floats) -> None:
        self.format = fmt
        self.lattice = LATTICES[fmt.name]
        self.table = Table.of(self.lattice)
        self.rows = rows
        self.errors = np.zeros_like(rows)
        count = rows.shape[1]
        self.columns = [slice(i, min(i + PANEL, count)) for i in range(0, count, PANEL)]
        self._parts: list[Parts | None] = [None] * len(self.columns)

    def parts(self, index: int) -> Parts:
        """The parts of panel ``index``, which must have been set."""
        found = self._parts[index]
        if found is None:
            raise ValueError(f"panel {index} has not been rounded")
        return found

    def split(self, packed: Bytes) -> Parts:
        """Parts of a panel's packed rows."""
        return self.lattice.split(packed.reshape(-1, self.format.nbytes))

    def steps(self, parts: Parts) -> tuple[Floats, Floats]:
        """A panel's steps and minimums, each (rows, columns / sub)."""
        step, low = self.lattice.steps(parts)
        return step.reshape(len(self.rows), -1), low.reshape(len(self.rows), -1)

    def set_parts(self, index: int, parts: Parts) -> None:
        """Set a panel, and the errors of its columns as they will be decoded."""
        columns = self.columns[index]
        self._parts[index] = parts
        values = self.lattice.values(parts).reshape(len(self.rows), -1)
        np.subtract(self.rows[:, columns], values, out=self.errors[:, columns])

    def set_codes(self, index: int, parts: Parts, codes: Codes) -> None:
        """Set a panel to ``codes`` (rows, columns) under the scales of ``parts``.

        Where a scale is zero the code says nothing, and the one of ``parts`` stays.
        """
        steps, _ = self.lattice.steps(parts)
        lost = np.repeat(steps == 0, self.lattice.sub, axis=1)
        chosen = np.where(lost, parts.codes, codes.reshape(parts.codes.shape))
        self.set_parts(index, replace(parts, codes=chosen))

    def pack(self) -> Bytes:
        """The packed rows, uint8 of shape (rows, row bytes)."""
        joined = [self.lattice.join(self.parts(i)) for i in range(len(self.columns))]
        return np.concatenate([part.reshape(len(self.rows), -1) for part in joined], axis=1)


def feed_back(
    table: Table, sub: int, target: Floats, weights: Floats, factor: Floats,
    steps: Floats, lows: Floats, crew: Workers,
) -> tuple[Codes, Floats]:  # fmt: skip
    """Codes and errors of a block of columns, rounded in order with feedback among them.

    Shapes: target, weights (n, columns); factor (columns, columns); steps, lows (n, runs of
    ``sub`` columns).
    """
    codes = np.empty(target.shape, np.uint8)
    errors = np.empty(target.shape, np.float32)
    target, weights, factor, steps, lows = map(
        np.ascontiguousarray, (target, weights, factor, steps, lows)
    )

    def share(start: int, stop: int) -> None:
        _native.feedback(
            table.levels, table.uniform, sub, target[start:stop], weights[start:stop], factor,
            steps[start:stop], lows[start:stop], codes[start:stop], errors[start:stop],
        )  # fmt: skip

    crew.run(len(target), share)
    return table.order[codes], errors


def sweep_panel(
    coded: Coded, parts: Parts, hessian: Floats, gradient: Floats, crew: Workers, *, scales: bool
) -> Parts:
    """Parts after one sweep over a panel; ``gradient`` is the errors times the whole Hessian."""
    lattice, table, rows = coded.lattice, coded.table, len(coded.rows)
    runs = hessian.shape[0] // lattice.sub
    sums = hessian.reshape(runs, lattice.sub, -1).sum(axis=1)
    rank = np.empty(len(lattice.levels), np.uint8)
    for code, level in enumerate(lattice.levels):
        rank[code] = np.searchsorted(table.levels, level)
    codes = rank[parts.codes].reshape(rows, -1)

    def shaped(values: Floats | Codes) -> Floats:
        return np.ascontiguousarray(values.reshape(rows, -1), np.float32)

    d, numbers = shaped(parts.d.copy()), shaped(parts.scales)
    low = None if parts.dmin is None else shaped(parts.dmin.copy())
    lows = None if parts.mins is None else shaped(parts.mins)

    def share(start: int, stop: int) -> None:
        part = slice(start, stop)
        _native.sweep(
            table.levels, table.uniform, lattice.sub, lattice.block, lattice.half,
            lattice.scale_range, lattice.min_range or (0, 0), hessian, sums, gradient[part],
            scales, codes[part], d[part], numbers[part],
            None if low is None else low[part], None if lows is None else lows[part],
        )  # fmt: skip

    crew.run(rows, share)
    return Parts(
        d.reshape(-1),
        numbers.reshape(parts.scales.shape).astype(np.int32),
        table.order[codes].reshape(parts.codes.shape),
        None if low is None else low.reshape(-1),
        None if lows is None or parts.mins is None
        else lows.reshape(parts.mins.shape).astype(np.int32),
    )  # fmt: skip
