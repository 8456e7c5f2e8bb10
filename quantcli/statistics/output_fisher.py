"""The Fisher information of a matrix's outputs: how much each direction matters to predictions.

With F the mean of g g^T, g being the gradient of the log-likelihood by the output, and H the mean
of x x^T over inputs, an error E of the weights costs about ``tr(F E H E^T) / 2`` of KL divergence:
the Fisher information of the weights, taken as a Kronecker product (K-FAC, arXiv:1503.05671).
Rounding under it is two-sided: the effect of a row's error is compensated by the rows after it, as
columns do within a row (YAQA, arXiv:2505.22988).

Rows in the tens of thousands are cut into strips that know nothing of one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from quantcli.checkpoint_view import Use
from quantcli.formats.base import Floats
from quantcli.layerwise.input_hooks import OutputGradient
from quantcli.layerwise.steady import steady
from quantcli.statistics.hessian import Hessian, prepare_hessian

STRIP = 4096
"""Rows that compensate one another's errors."""
DAMPING = 0.05
"""Added to the diagonal, as a share of its mean."""
FEW = 4
"""Fewer gradients than this many times a strip's rows make correlations count for less."""


def cut_strips(rows: int) -> list[slice]:
    """Slices of at most `STRIP` rows, as even as they can be."""
    parts = np.array_split(np.arange(rows), -(-rows // STRIP))
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


@dataclass(frozen=True)
class OutputFisher:
    """Means of g g^T over the outputs of one matrix, one for each strip of `cut_strips`."""

    rows: int
    means: tuple[Floats, ...]

    def prepare(self) -> list[Hessian]:
        """The damped and factored mean of each strip, the rows that matter most first."""
        return [prepare_hessian(mean, DAMPING, "activation") for mean in self.means]

    def weigh(self, errors: Floats) -> Floats:
        """F times ``errors`` (rows, columns)."""
        parts = zip(self.means, cut_strips(self.rows), strict=True)
        return np.concatenate([mean @ errors[strip] for mean, strip in parts])


@dataclass
class OutputGradientAccumulator:
    """Sums of g g^T for the tensors of one layer, while windows pass it backwards.

    ``uses`` locates a parameter's rows among the tensors, ``rows`` how many a matrix of a
    tensor has: those that are missing there are left out. The experts of a stack share one mean,
    for which all of their outputs must be the same channels.
    """

    uses: Callable[[str], list[Use]]
    rows: Mapping[str, int]
    _sums: dict[str, list[Floats]] = field(default_factory=dict)
    _counts: dict[tuple[str, int], int] = field(default_factory=dict)

    def observe(self, gradient: OutputGradient) -> None:
        """Add the gradient by one product's output."""
        uses = self.uses(gradient.name)
        if gradient.stacked:
            for name in {use.tensor.name for use in uses} & self.rows.keys():
                self._add(name, 0, gradient.rows.float())
            return
        for use in uses:
            name = use.tensor.name
            if name not in self.rows or not use.piece.makes_outputs:
                continue
            places = torch.from_numpy(use.piece.source_rows(0, use.piece.rows))
            values = gradient.rows.float()[:, places.to(gradient.rows.device)]
            self._add(name, use.first % use.tensor.shape[-2], values)

    @steady()
    def _add(self, name: str, first: int, values: torch.Tensor) -> None:
        strips = cut_strips(self.rows[name])
        if name not in self._sums:
            sizes = [strip.stop - strip.start for strip in strips]
            self._sums[name] = [np.zeros((size, size), np.float32) for size in sizes]
        for whole, strip in zip(self._sums[name], strips, strict=True):
            start, stop = max(first, strip.start), min(first + values.shape[1], strip.stop)
            if start < stop:
                own = values[:, start - first : stop - first]
                inside = slice(start - strip.start, stop - strip.start)
                whole[inside, inside] += (own.T @ own).cpu().numpy()
        key = name, first
        self._counts[key] = self._counts.get(key, 0) + len(values)

    def means(self) -> dict[str, OutputFisher]:
        """What was found, by tensor; nothing where the mean is zero or not finite."""
        found = {}
        for name, sums in self._sums.items():
            count = max(n for (tensor, _), n in self._counts.items() if tensor == name)
            means = tuple(_shrink(part / np.float32(count), count) for part in sums)
            if all(np.isfinite(mean).all() and mean.any() for mean in means):
                found[name] = OutputFisher(self.rows[name], means)
        return found


def _shrink(mean: Floats, count: int) -> Floats:
    """Correlations of few samples are mostly chance: the fewer, the less they count."""
    share = count / (FEW * len(mean))
    if share < 1:
        diagonal = mean.diagonal().copy()
        mean *= np.float32(share)
        np.fill_diagonal(mean, diagonal)
    return mean
