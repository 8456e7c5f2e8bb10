"""What is summed of a weight's inputs, all in one pass.

For each column of a weight (an input channel): the sum of squares, always; the largest and the mean
absolute value (SmoothQuant, AWQ); the mean (corrections of biases); the least and the largest value
(static scales of activations), for which there is a histogram of all columns' values besides; and
the Hessian of the layer's squared error, X^T X over the input rows (GPTQ). Squares, absolute values
and values are summed in float64 over float32 values. A Hessian is the float64 sum of one float32
product for each window, held in a file, once for all weights that share an input (q, k and v; gate
and up), and stored as float32.
Experts are summed each by itself, with its own count of tokens; those of several windows wait for
one another, since a window sends few to each and each product is added to all columns by all
columns. So do a wide matrix's, up to `TOGETHER` rows. A stack whose matrices have one input (latent
attention's values) has one Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.artifacts.scratch import create_array
from quantcli.errors import SourceError
from quantcli.layerwise.devices import widest
from quantcli.layerwise.input_hooks import MatmulInput
from quantcli.layerwise.steady import steady
from quantcli.ranks.group import Group
from quantcli.statistics.device_sums import DeviceSums
from quantcli.statistics.hessian import WIDE
from quantcli.statistics.input_histogram import BINS, count_values
from quantcli.statistics.input_statistics import HISTOGRAM, MEAN
from quantcli.types import OutputTensor

_ROWS = 64
TOGETHER = 2048
"""Inputs of a wide matrix that are added up by one product."""
_WAITING = 1 << 28
"""Bytes of inputs that wait for more of them."""

Targets = Callable[[str, int], list[tuple[OutputTensor, int]]]
"""From a parameter and a matrix within it to GGUF's tensors, with the matrix's number in each."""

Totals = NDArray[np.float64]


@dataclass
class InputTotals:
    """Totals over the inputs of one tensor: (matrices, columns) each, ``counts`` (matrices,)."""

    counts: NDArray[np.int64]
    squares: Totals
    largest: Totals
    absolute: Totals
    low: Totals
    high: Totals
    """Zero is among the values, where a matrix saw none too."""
    histogram: Totals | None = None
    """Of all columns together, (matrices, BINS); None where it is not wanted."""
    sums: Totals | None = None
    """Of the values themselves; None where they are not wanted."""


@dataclass(frozen=True)
class _Row:
    """One product's input, summed up."""

    count: int
    squares: Totals
    largest: Totals | None
    absolute: Totals | None
    low: Totals | None
    high: Totals | None
    histogram: Totals | None
    sums: Totals | None


class Collector:
    """Totals up what the weights of one layer see.

    ``folder`` takes the Hessians' files while they grow.
    """

    def __init__(self, targets: Targets, needs: tuple[str, ...], folder: Path, place: str) -> None:
        self.entries: dict[str, InputTotals] = {}
        self.hessian_of: dict[str, str] = {}
        """For each tensor the one under whose name their common Hessian is held."""
        self.weighed: dict[str, Totals] = {}
        """By the same names the sum of the rows' weights, (matrices,)."""
        self._targets = targets
        self._needs = needs
        self._folder = folder
        self._place = place
        self._homes: dict[str, str] = {}
        self._hessians: dict[str, NDArray[np.float64]] = {}
        self._sums = DeviceSums()
        self._pass: dict[tuple[str, int], _Row] = {}
        self._whole: tuple[str, Totals] | None = None
        self._everyone: dict[str, Totals] = {}
        self._waiting: dict[tuple[str, int], list[torch.Tensor]] = {}
        self._waiting_bytes = 0

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, number: int) -> Callable[[MatmulInput], None]:
        """Inputs of window ``number`` follow: none of them was seen before. Returns `observe`."""
        self._pass.clear()
        self._whole = None
        return self.observe

    def observe(self, product: MatmulInput, weights: torch.Tensor | None = None) -> None:
        """Add one product's input. SourceError when it holds a value that is not finite.

        ``weights`` (tokens,) are what its rows count in the Hessian, if each matrix has its own.
        """
        targets = self._targets(product.name, product.matrix)
        if not targets or not len(product.rows):
            return
        row = self._pass.get(product.shared)
        if row is None:
            row = self._pass[product.shared] = self._sum(product.rows.float())
        if not np.isfinite(row.squares).all():
            names = " and ".join(tensor.name for tensor, _ in targets)
            raise SourceError(
                f"{self._place}: the input of {names} holds a value that is not finite",
                hint="the weights before it may be damaged: 'quantcli inspect --stats' tells",
            )
        if "hessian" in self._needs:
            self._add_hessian(product, targets, weights)
        for tensor, matrix in targets:
            self._add(tensor, matrix, row)

    def hessians(self) -> dict[str, NDArray[np.float64]]:
        """The Hessians by the name of the tensor that holds them: (matrices, columns, columns).

        There is one where all matrices of the tensor have one input.
        """
        self._add_waiting()
        self._sums.leave()
        return self._hessians

    def whole_hessian(self, home: str) -> Totals:
        """The sum over all matrices of a stack, kept for the next of them."""
        if home in self._everyone:
            return self._everyone[home]
        if self._whole is None or self._whole[0] != home:
            sums = self.hessians()[home]
            total = sum((sums[i] for i in range(1, len(sums))), sums[0].copy())
            self._whole = (home, np.asarray(total))
        return self._whole[1]

    def add_up(self, group: Group, takers: Callable[[str, int], Sequence[int]]) -> None:
        """Put together what all ranks of ``group`` have seen.

        Counts and sums of columns everywhere, the Hessian of matrix i under the name n on the ranks
        ``takers(n, i)``, and the sum over a stack's matrices on all. After `settle`.
        """
        for name in sorted(self.entries):
            entry = self.entries[name]
            own_sums = (entry.counts, entry.squares, entry.absolute, entry.histogram, entry.sums)
            for totals in own_sums:
                if totals is not None:
                    group.add_up(totals)
            for own in (entry.largest, entry.low, entry.high):
                choose = np.minimum if own is entry.low else np.maximum
                own[:] = choose.reduce(group.gather(own))
        for home, sums in sorted(self.hessians().items()):
            group.add_up(self.weighed[home])
            if len(sums) > 1:
                total = sum((sums[i] for i in range(1, len(sums))), sums[0].copy())
                self._everyone[home] = np.asarray(total)
                group.add_up(self._everyone[home])
            for matrix, own in enumerate(sums):
                group.add_up(own, takers(home, matrix))

    def settle(self, group: Group) -> None:
        """Make room for what other ranks have seen and this one has not."""
        own = self.hessians()
        shapes = {name: entry.squares.shape for name, entry in self.entries.items()}
        for theirs, homes, hessian_of in group.gather(
            (shapes, {home: sums.shape for home, sums in own.items()}, self.hessian_of)
        ):
            for name, shape in theirs.items():
                if name not in self.entries:
                    self.entries[name] = self._zeros(shape)
            for home, shape in homes.items():
                if home not in own:
                    file = self._file(len(own))
                    own[home] = create_array(file, np.float64, shape)
                    self.weighed[home] = np.zeros(shape[0])
            for name, home in hessian_of.items():
                self.hessian_of.setdefault(name, home)

    def close(self) -> None:
        """Remove the Hessians' files."""
        self._sums.forget()
        for index in range(len(self._hessians)):
            self._file(index).unlink(missing_ok=True)
        self._hessians.clear()
        self._waiting.clear()
        self._waiting_bytes = 0

    @steady()
    def _sum(self, values: torch.Tensor) -> _Row:
        squares: Any = 0.0
        absolute: Any = 0.0
        sums: Any = 0.0
        largest: Any = None
        low: Any = None
        high: Any = None
        histogram = np.zeros(BINS) if HISTOGRAM in self._needs else None
        wide = widest(values.device)
        # A few rows at a time: float64 copies of a wide layer's whole input would be the peak.
        for part in values.split(_ROWS):
            squares = squares + part.square().sum(0, dtype=wide)
            if "mean_abs" in self._needs:
                absolute = absolute + part.abs().sum(0, dtype=wide)
            if MEAN in self._needs:
                sums = sums + part.sum(0, dtype=wide)
            if "abs_max" in self._needs:
                top = part.abs().amax(0)
                largest = top if largest is None else torch.maximum(largest, top)
            if "min_max" in self._needs:
                least, most = part.aminmax(dim=0)
                low = least if low is None else torch.minimum(low, least)
                high = most if high is None else torch.maximum(high, most)
            if histogram is not None:
                histogram += count_values(part.cpu().numpy())
        return _Row(
            len(values),
            _array(squares),
            None if largest is None else _array(largest),
            _array(absolute) if "mean_abs" in self._needs else None,
            None if low is None else _array(low),
            None if high is None else _array(high),
            histogram,
            _array(sums) if MEAN in self._needs else None,
        )

    def _add(self, tensor: OutputTensor, matrix: int, row: _Row) -> None:
        entry = self.entries.get(tensor.name)
        if entry is None:
            entry = self._zeros((tensor.matrices, tensor.columns))
            self.entries[tensor.name] = entry
        entry.counts[matrix] += row.count
        entry.squares[matrix] += row.squares
        if row.largest is not None:
            np.maximum(entry.largest[matrix], row.largest, out=entry.largest[matrix])
        if row.absolute is not None:
            entry.absolute[matrix] += row.absolute
        if row.low is not None and row.high is not None:
            np.minimum(entry.low[matrix], row.low, out=entry.low[matrix])
            np.maximum(entry.high[matrix], row.high, out=entry.high[matrix])
        if row.histogram is not None and entry.histogram is not None:
            entry.histogram[matrix] += row.histogram
        if row.sums is not None and entry.sums is not None:
            entry.sums[matrix] += row.sums

    def _zeros(self, shape: tuple[int, ...]) -> InputTotals:
        """Totals of (matrices, columns) of which nothing was seen."""
        entry = InputTotals(np.zeros(shape[0], np.int64), *(np.zeros(shape) for _ in range(5)))
        if HISTOGRAM in self._needs:
            entry.histogram = np.zeros((shape[0], BINS))
        if MEAN in self._needs:
            entry.sums = np.zeros(shape)
        return entry

    def _add_hessian(
        self, product: MatmulInput, targets: list[tuple[OutputTensor, int]],
        weights: torch.Tensor | None,
    ) -> None:  # fmt: skip
        tensor, matrix = targets[0]
        first, first_matrix = product.shared
        home = self._homes.get(product.name)
        if home is None:
            alike = first in self._homes and first_matrix == product.matrix
            home = self._homes[product.name] = self._homes[first] if alike else tensor.name
        for name in (target.name for target, _ in targets):
            self.hessian_of[name] = home
        if home != tensor.name:
            if self._homes.get(first) != home:
                raise RuntimeError(f"{tensor.name} no longer shares its input with {home}")
            return
        if home not in self._hessians:
            # One for all of a stack's matrices, where they have one input.
            alike = sum(target is tensor for target, _ in targets) > 1
            shape = (1 if alike else tensor.matrices, tensor.columns, tensor.columns)
            file = self._file(len(self._hessians))
            self._hessians[home] = create_array(file, np.float64, shape)
            self.weighed[home] = np.zeros(shape[0])
        if len(self._hessians[home]) == 1:
            self.weighed[home][0] += len(product.rows)
            self._add_plain(home, matrix, product.rows)
            return
        self.weighed[home][matrix] += len(product.rows) if weights is None else _total(weights)
        rows = product.rows.clone() if weights is None else _weigh(product.rows, weights)
        self._waiting.setdefault((home, matrix), []).append(rows)
        self._waiting_bytes += rows.nbytes
        if self._waiting_bytes >= _WAITING:
            self._add_waiting()

    def _add_plain(self, home: str, matrix: int, rows: torch.Tensor) -> None:
        """Add up inputs of a matrix that is alone, those of a wide one when there are enough."""
        if rows.shape[1] < WIDE or rows.device.type != "cpu":
            self._add_product(home, matrix, rows)
            return
        waiting = self._waiting.setdefault((home, matrix), [])
        waiting.append(rows.clone())
        self._waiting_bytes += rows.nbytes
        if sum(map(len, waiting)) >= TOGETHER:
            self._waiting_bytes -= sum(part.nbytes for part in waiting)
            self._add_product(home, matrix, torch.cat(self._waiting.pop((home, matrix))))
        elif self._waiting_bytes >= _WAITING:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Add up the inputs that waited, one product for each matrix."""
        for (home, matrix), parts in self._waiting.items():
            self._add_product(home, matrix, torch.cat(parts))
        self._waiting.clear()
        self._waiting_bytes = 0

    def _add_product(self, home: str, matrix: int, rows: torch.Tensor) -> None:
        with steady():
            self._sums.add(self._hessians[home][matrix], rows.float())

    def _file(self, index: int) -> Path:
        return self._folder / f"hessian-{index}.f64"


def _weigh(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return rows.float() * weights.to(rows.device).sqrt()[:, None]


def _total(weights: torch.Tensor) -> float:
    return float(weights.cpu().double().sum())


def _array(values: Any) -> Totals:
    found: Totals = values.cpu().double().numpy()
    return found
