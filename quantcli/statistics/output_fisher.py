"""The Fisher information of a matrix's outputs: how much each direction matters to predictions.

With F the mean of g g^T, g being the gradient of the log-likelihood by the output, and H the mean
of x x^T over inputs, an error E of the weights costs about ``tr(F E H E^T) / 2`` of KL divergence:
the Fisher information of the weights, taken as a Kronecker product (K-FAC, arXiv:1503.05671).
Rounding under it is two-sided: the effect of a row's error is compensated by the rows after it, as
columns do within a row (YAQA, arXiv:2505.22988).

Rows in the tens of thousands are cut into strips that know nothing of one another. The experts of
a stack that add to the residual stream have one mean, each of the others its own over the tokens
that it got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from quantcli.artifacts.scratch import create_array
from quantcli.formats.base import Floats
from quantcli.layerwise.input_hooks import OutputGradient
from quantcli.layerwise.parameters import OutputRows
from quantcli.layerwise.steady import steady
from quantcli.ranks.group import Group
from quantcli.statistics.device_sums import DeviceSums
from quantcli.statistics.hessian import Hessian, prepare_hessian
from quantcli.statistics.token_weights import TokenWeights
from quantcli.types import OutputTensor

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


@dataclass(frozen=True, eq=False)
class OutputFisher:
    """Means of g g^T over the outputs of one matrix, one for each strip of `cut_strips`.

    ``keep``: other matrices have the same, so that factors are kept for them.
    """

    rows: int
    means: tuple[Floats, ...]
    keep: bool = field(default=False, kw_only=True)

    @cached_property
    def prepared(self) -> tuple[Hessian, ...]:
        """The damped and factored mean of each strip, the rows that matter most first."""
        return tuple(self._prepare(mean) for mean in self.means)

    def prepare(self, strip: int) -> Hessian:
        """One of `prepared`, which the caller has for itself unless all are kept."""
        return self.prepared[strip] if self.keep else self._prepare(self.means[strip])

    def _prepare(self, mean: Floats) -> Hessian:
        return prepare_hessian(mean, DAMPING, "activation")

    @property
    def strips(self) -> tuple[tuple[slice, Floats], ...]:
        """Each strip's rows and mean."""
        return tuple(zip(cut_strips(self.rows), self.means, strict=True))


@dataclass(frozen=True)
class StackShape:
    """The matrices of a tensor and how many rows each has.

    ``shared``: all put out the same channels, and so have one mean.
    """

    matrices: int
    rows: int
    shared: bool

    @classmethod
    def of(cls, tensor: OutputTensor) -> StackShape:
        """Experts add to the one residual stream; their other outputs are their own."""
        matrices = tensor.matrices
        shared = matrices == 1 or tensor.name.endswith("ffn_down_exps.weight")
        return cls(matrices, tensor.shape[-2], shared)


class LayerFisher:
    """The output Fisher information of the tensors of one layer, while windows pass it backwards.

    ``outputs`` locates a parameter's outputs among the tensors; those that are missing in
    ``shapes`` are left out. ``folder`` takes the sums of stacks in files, until `close`.
    """

    def __init__(
        self, outputs: Callable[[str, int], Iterable[OutputRows]], shapes: Mapping[str, StackShape],
        folder: Path, make: Callable[..., OutputFisher] = OutputFisher,
    ) -> None:  # fmt: skip
        self._outputs = outputs
        self._shapes = shapes
        self._folder = folder
        self._make = make
        self._sums: dict[str, list[Floats]] = {}
        self._added = DeviceSums()
        self._files: list[Path] = []
        self._counts: dict[tuple[str, int, int], int] = {}
        self._shared: dict[str, OutputFisher | None] = {}
        self.window = 0
        """The number of the window that passes."""
        self.weights = TokenWeights()

    def observe(self, gradient: OutputGradient) -> None:
        """Add the gradient by one product's output."""
        width = gradient.rows.shape[1]
        is_stack = False
        for part in self._outputs(gradient.name, gradient.matrix):
            name = part.tensor.name
            if name in self._shapes and len(part.numbers) and part.numbers.max() < width:
                numbers = torch.from_numpy(part.numbers).to(gradient.rows.device)
                matrix = 0 if self._shapes[name].shared else part.matrix
                self._add(name, matrix, part.first, gradient.rows.float()[:, numbers])
                is_stack = is_stack or self._shapes[name].matrices > 1
        if is_stack:
            self.weights.add(self.window, gradient)

    def add_up(self, group: Group, takers: Callable[[str, int], Sequence[int]]) -> None:
        """Put together what all ranks of ``group`` have seen.

        The sums of matrix i of tensor n are on the ranks ``takers(n, i)``, those that the matrices
        of a stack share on all.
        """
        self._added.leave()
        everyone = group.gather(self._counts)
        for key in sorted({key for counts in everyone for key in counts}):
            self._counts[key] = sum(counts.get(key, 0) for counts in everyone)
        for name in sorted({name for name, _, _ in self._counts}):
            shape = self._shapes[name]
            if name not in self._sums:
                self._sums[name] = [self._create(name, s) for s in cut_strips(shape.rows)]
            for whole in self._sums[name]:
                for matrix, sums in enumerate(whole):
                    is_common = shape.shared and shape.matrices > 1
                    group.add_up(sums, None if is_common else takers(name, matrix))

    def of(self, name: str, matrix: int) -> OutputFisher | None:
        """What was found of a matrix; None where no gradient came, or none that is finite."""
        shape = self._shapes.get(name)
        if shape is None or not shape.shared:
            return self._mean(name, matrix)
        if shape.matrices == 1:
            return self._mean(name, 0)
        if name not in self._shared:
            # Factored once for all matrices.
            self._shared[name] = self._mean(name, 0, keep=True)
        return self._shared[name]

    def __enter__(self) -> LayerFisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything, the sums' files too."""
        self._added.forget()
        self._sums.clear()
        self._shared.clear()
        for file in self._files:
            file.unlink(missing_ok=True)

    def _mean(self, name: str, matrix: int, *, keep: bool = False) -> OutputFisher | None:
        self._added.leave()
        counts = [
            n for (own, index, _), n in self._counts.items() if (own, index) == (name, matrix)
        ]
        if not counts:
            return None
        means = tuple(
            _shrink(np.asarray(part[matrix] / np.float32(max(counts))), max(counts))
            for part in self._sums[name]
        )
        if not all(np.isfinite(mean).all() and mean.any() for mean in means):
            return None
        return self._make(self._shapes[name].rows, means, keep=keep)

    @steady()
    def _add(self, name: str, matrix: int, first: int, values: torch.Tensor) -> None:
        strips = cut_strips(self._shapes[name].rows)
        if name not in self._sums:
            self._sums[name] = [self._create(name, strip) for strip in strips]
        for whole, strip in zip(self._sums[name], strips, strict=True):
            start, stop = max(first, strip.start), min(first + values.shape[1], strip.stop)
            if start < stop:
                own = values[:, start - first : stop - first]
                inside = slice(start - strip.start, stop - strip.start)
                self._added.add(whole[matrix], own, inside)
        key = name, matrix, first
        self._counts[key] = self._counts.get(key, 0) + len(values)

    def _create(self, name: str, strip: slice) -> Floats:
        size = strip.stop - strip.start
        if self._shapes[name].shared:
            return np.zeros((1, size, size), np.float32)
        self._files.append(self._folder / f"fisher-{len(self._files)}.f32")
        return create_array(self._files[-1], np.float32, (self._shapes[name].matrices, size, size))


def _shrink(mean: Floats, count: int) -> Floats:
    """Correlations of few samples are mostly chance: the fewer, the less they count."""
    share = count / (FEW * len(mean))
    if share < 1:
        diagonal = mean.diagonal().copy()
        mean *= np.float32(share)
        np.fill_diagonal(mean, diagonal)
    return mean
