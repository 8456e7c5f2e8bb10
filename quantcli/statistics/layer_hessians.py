"""Accumulates x x^T over the inputs of one layer's weights, and a quantized prefix's drift.

Every eighth window is summed apart: it judges what the others were fitted to. With a quantized
prefix, x^ being its inputs and x the original ones, the mean of x^ x^T^ takes the Hessian's place,
and the best target for the weights W is no longer W but ``W + W C H^-1`` with C the mean of
(x - x^) x^T^: least squares for the original outputs (as in GPTAQ, arXiv:2504.02692). How much of
that correction is taken, the held-out windows decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.formats.base import Floats
from quantcli.layerwise.input_hooks import MatmulInput
from quantcli.layerwise.steady import steady
from quantcli.ranks.group import Group
from quantcli.statistics.algebra import HOST, Algebra
from quantcli.statistics.collector import Collector, Targets
from quantcli.statistics.hessian import WIDE, Hessian
from quantcli.statistics.matrix_statistics import Drift, MatrixStatistics
from quantcli.statistics.panel_hessian import prepare_panels
from quantcli.statistics.symmetric_mean import SymmetricMean
from quantcli.statistics.token_weights import TokenWeights
from quantcli.types import Note

Lost = dict[tuple[str, int], NDArray[np.float64]]

HELD_OUT = 8
"""Every so many windows one is kept from the fit, to judge it."""
FEW = 4
"""Fewer inputs than this many times the width of a layer make its Hessian uncertain."""


def is_held_out(place: int) -> bool:
    """Whether a window judges rather than being fitted to."""
    return place % HELD_OUT == HELD_OUT - 1


class HessianAccumulator:
    """Means and factored Hessians of one layer's inputs, the last one kept for its neighbours."""

    def __init__(
        self, targets: Targets, folder: Path, place: str, damping: float, order: str,
        algebra: Algebra = HOST,
    ) -> None:  # fmt: skip
        self._damping, self._order = damping, order
        self._algebra = algebra
        self._parts = []
        for part in ("fit", "held-out"):
            own = folder / part
            own.mkdir(exist_ok=True)
            self._parts.append(Collector(targets, ("mean_sq", "hessian"), own, place))
        self._fit, self._held_out = self._parts
        self._now = self._fit
        self._originals: dict[tuple[str, int], torch.Tensor] = {}
        self._lost: tuple[Lost, Lost] = ({}, {})
        self._targets = targets
        self._last: tuple[tuple[str, int], MatrixStatistics | None] | None = None
        self._added: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        self._notes: list[Note] = []
        self._few: dict[str, dict[int, int]] = {}
        self.weights: TokenWeights | None = None
        """What rows of windows to come count."""
        self._window = 0

    def add(self, fit: NDArray[np.float64], held_out: NDArray[np.float64]) -> None:
        """Another quadratic loss of the same weights, to be added to both means."""
        self._added = (fit, held_out)

    @property
    def names(self) -> list[str]:
        """The tensors that were multiplied with, those with a common input together."""
        shares = self._fit.hessian_of
        return sorted(self._fit.entries, key=lambda name: (shares[name], name))

    def add_up(self, group: Group, takers: Callable[[str, int], Sequence[int]]) -> None:
        """Put together what all ranks have seen; see `Collector.add_up`.

        After `settle`, by which all know of the same names.
        """
        for part in self._parts:
            part.add_up(group, takers)

    def settle(self, group: Group) -> None:
        """Know of what other ranks have seen."""
        for part in self._parts:
            part.settle(group)

    def home(self, name: str, matrix: int) -> tuple[str, int]:
        """Under which name, and as which matrix, the Hessian of a matrix is held."""
        home = self._fit.hessian_of[name]
        return home, min(matrix, len(self._fit.hessians()[home]) - 1)

    @property
    def notes(self) -> list[Note]:
        """What is to be said of the statistics that `of` gave."""
        few = (self._describe_few(home, [*found.values()]) for home, found in self._few.items())
        return [*few, *self._notes]

    def seen(self, name: str, matrix: int) -> int:
        """Inputs of matrix ``matrix``, held-out ones included."""
        parts = (part.entries[name].counts for part in self._parts if name in part.entries)
        return sum(int(counts[matrix]) for counts in parts)

    def watch(self, number: int, place: int | None = None) -> Callable[[MatmulInput], None]:
        """Inputs of window ``number`` follow, ``place`` among those of all ranks.

        Returns `observe`.
        """
        place = number if place is None else place
        self._now = self._held_out if is_held_out(place) else self._fit
        self._now.watch(number)
        self._window = number
        self._originals.clear()
        return self.observe

    def observe(self, product: MatmulInput) -> None:
        """Add an input, weighed where `weights` has something on it."""
        weights = None if self.weights is None else self.weights.of(self._window, product)
        self._now.observe(product, weights)

    def remember(self, product: MatmulInput) -> None:
        """Keep an original input, to compare the prefix's own with."""
        if product.shared == (product.name, product.matrix):
            self._originals[product.shared] = product.rows

    def compare(self, product: MatmulInput) -> None:
        """Add an input that the quantized prefix gave, and what it differs by."""
        self._now.observe(product)
        original = self._originals.get((product.name, product.matrix))
        # Experts that the prefix chose otherwise have no original to compare with.
        if original is not None and original.shape == product.rows.shape:
            targets = self._targets(product.name, product.matrix)
            if not targets or targets[0][0].name not in self._fit.hessian_of:
                return
            home = (self._fit.hessian_of[targets[0][0].name], targets[0][1])
            seen = product.rows.float()
            with steady():
                part = ((original.float() - seen).T @ seen).cpu().numpy()
            lost = self._lost[self._now is self._held_out]
            held = lost.get(home)
            lost[home] = part.astype(np.float64) if held is None else held + part

    def __enter__(self) -> HessianAccumulator:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the sums' files."""
        for part in self._parts:
            part.close()

    def of(self, name: str, matrix: int) -> MatrixStatistics | None:
        """Statistics of matrix ``matrix``; None when the text never reached it."""
        key = self.home(name, matrix)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._prepare(*key))
        return self._last[1]

    def _prepare(self, home: str, matrix: int) -> MatrixStatistics | None:
        sums = self._fit.hessians()[home]
        by_rows = self._algebra is HOST and self._order == "natural"
        if by_rows and len(sums) == 1 and sums.shape[-1] >= WIDE:
            return self._prepare_wide(home)
        mean = _mean(self._fit, home, matrix)
        if mean is None:
            return None
        columns, count = mean.shape[1], int(self._fit.entries[home].counts[matrix])
        if count < FEW * columns:
            # Correlations of few samples are mostly chance: the fewer, the less they count.
            diagonal = mean.diagonal().copy()
            mean *= np.float32(count / (FEW * columns))
            np.fill_diagonal(mean, diagonal)
            self._few.setdefault(home, {})[matrix] = count
        held_out = _mean(self._held_out, home, matrix)
        if self._added is not None:
            mean += self._added[0].astype(np.float32)
            if held_out is not None:
                held_out += self._added[1].astype(np.float32)
        hessian = self._algebra.prepare(mean, self._damping, self._order)
        self._note_damping(home, hessian)
        drift = self._drift(home, matrix, hessian)
        judge_of = mean if held_out is None else held_out
        return self._algebra.statistics(hessian, mean, judge_of, drift)

    def _prepare_wide(self, home: str) -> MatrixStatistics | None:
        """The same of a wide matrix, whose means are read from the sums' files by rows."""
        entry = self._fit.entries[home]
        count, columns = int(entry.counts[0]), entry.squares.shape[1]
        if not count:
            return None
        share = min(1.0, count / (FEW * columns))
        if share < 1:
            self._few.setdefault(home, {})[0] = count
        fit_added, held_out_added = self._added or (None, None)
        fit = SymmetricMean(self._fit.hessians()[home][0], count, share, fit_added)
        held_out = fit
        if home in self._held_out.entries and self._held_out.entries[home].counts[0]:
            held_out = SymmetricMean(
                self._held_out.hessians()[home][0], int(self._held_out.entries[home].counts[0]),
                added=held_out_added,
            )  # fmt: skip
        hessian = prepare_panels(fit.rows, columns, self._damping)
        self._note_damping(home, hessian)
        return MatrixStatistics(hessian, fit, held_out, self._drift(home, 0, hessian))

    def _note_damping(self, home: str, hessian: Hessian) -> None:
        if hessian.damping > self._damping:
            self._notes.append(
                Note(
                    f"{home}: its Hessian needed a damping of {hessian.damping:g} instead of "
                    f"{self._damping:g} to be positive definite",
                    level="warning",
                )
            )

    def _drift(self, home: str, matrix: int, hessian: Hessian) -> Drift | None:
        lost, judge = (part.get((home, matrix)) for part in self._lost)
        if lost is None or judge is None:
            return None
        count = int(self._fit.entries[home].counts[matrix])
        judged = int(self._held_out.entries[home].counts[matrix])
        fitted = (lost / count).astype(np.float32)
        return Drift(
            np.linalg.solve(hessian.matrix, fitted.T).T, (judge / judged).astype(np.float32)
        )

    def _describe_few(self, home: str, counts: list[int]) -> Note:
        columns = self._fit.hessians()[home].shape[-1]
        matrices = len(self._fit.hessians()[home])
        enough, least = FEW * columns, min(counts)
        if matrices == 1:
            sentence = (
                f"{home}: {least} inputs are few for {columns} columns, so correlations count "
                f"for {least / enough:.0%}; more text would help"
            )
        else:
            none = sum(not count for count in counts)
            sentence = (
                f"{home}: {len(counts)} of {matrices} experts saw less than {enough} inputs, "
                f"{none} none and the others from {min((c for c in counts if c), default=0)} "
                f"on, so correlations count for less there; more text would help"
            )
        return Note(sentence, level="warning")


def _mean(collector: Collector, home: str, matrix: int) -> Floats | None:
    """The mean of x x^T; an expert's is drawn to that of all its layer's experts."""
    if home not in collector.entries:
        return None
    counts = collector.entries[home].counts
    sums: Any = collector.hessians()[home]
    weighed = collector.weighed[home]
    if not counts.any():
        return None
    if len(sums) == 1:
        return np.asarray(sums[0] / counts[0], np.float32)
    columns, weight, count = sums.shape[1], weighed[matrix], counts[matrix]
    everyone = collector.whole_hessian(home) / weighed.sum()
    own = sums[matrix] * (count / weight if weight > 0 else 0.0)
    return np.asarray((own + columns * everyone) / (count + columns), np.float32)
