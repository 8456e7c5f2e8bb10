"""`quantcli.rounding.kernels.ScalarKernels` as torch operations, all rows at once.

Columns are taken one by one as in ``native/kernels/lattice.c``, and each sum over columns runs in
the same order, so on the CPU the codes are the native kernels' bit by bit. What is summed within a
run or a block for its scales (``native/kernels/descent.h``) comes from matrix products instead.
Tensors have columns first here, so that a column is one piece of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantcli.rounding.device import fused_kernels
from quantcli.rounding.kernels import ScalarKernels


@dataclass(frozen=True, eq=False)
class TensorLevels:
    """Levels in rising order, and the middles between them; ``uniform`` ones are one apart."""

    values: torch.Tensor
    middles: torch.Tensor
    uniform: bool
    low: float
    top: float

    @classmethod
    def of(cls, kernels: ScalarKernels, device: torch.device) -> TensorLevels:
        """Those of the native kernels."""
        values = torch.from_numpy(kernels.levels).to(device)
        middles = values[:-1] + 0.5 * (values[1:] - values[:-1])
        low, count = float(kernels.levels[0]), len(kernels.levels)
        return cls(values, middles, kernels.uniform, low, float(count - 1))

    def nearest(self, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the nearest levels, and these; of a NaN the last, or if uneven the first."""
        if self.uniform:
            place = ratio - self.low
            place = torch.where(place < self.top, place, self.top)
            place = torch.where(place > 0, place, 0.0).round_()
            return place.to(torch.uint8), place + self.low
        place = torch.searchsorted(self.middles, ratio.nan_to_num(nan=-torch.inf))
        return place.to(torch.uint8), self.values[place]


@dataclass
class Tile:
    """A block of columns under descent: values, gradient and levels (columns, n), ``hessian``."""

    hessian: torch.Tensor
    gradient: torch.Tensor
    levels: torch.Tensor
    values: torch.Tensor

    def change(self, columns: slice, changes: torch.Tensor) -> None:
        """The values of some columns change; the gradient of all follows."""
        self.values[columns] += changes
        self.gradient -= self.hessian[columns].T @ changes


@dataclass(frozen=True, eq=False)
class TensorScalarKernels:
    """`ScalarKernels` on a device. Shapes are as there: rows first, and so are the results."""

    levels: TensorLevels
    kernels: ScalarKernels

    @classmethod
    def of(cls, kernels: ScalarKernels, device: torch.device) -> TensorScalarKernels:
        """The same kernels on a device."""
        return cls(TensorLevels.of(kernels, device), kernels)

    def feedback(
        self, run: int, target: torch.Tensor, weights: torch.Tensor, factor: torch.Tensor,
        steps: torch.Tensor, lows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """`ScalarKernels.feedback`: codes (uint8) and errors (n, columns)."""
        fused = fused_kernels.find(target.device)
        if fused is not None:
            return fused.feedback(self.levels, run, target, weights, factor, steps, lows)  # type: ignore[no-any-return]
        x, w = target.T.clone(memory_format=torch.contiguous_format), weights.T
        steps, lows = steps.T.contiguous(), lows.T.contiguous()
        codes, errors = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
        for j in range(len(x)):
            step, low = steps[j // run], lows[j // run]
            code, level = self.levels.nearest((x[j] + low) / step)
            error = w[j] - (step * level - low)
            codes[j], errors[j] = code, error
            x[j + 1 :] += factor[j, j + 1 :, None] * error
        return codes.T.contiguous(), errors.T.contiguous()

    def sweep_codes(
        self, run: int, hessian: torch.Tensor, gradient: torch.Tensor, codes: torch.Tensor,
        steps: torch.Tensor, lows: torch.Tensor,
    ) -> tuple[torch.Tensor, Tile]:  # fmt: skip
        """Every code to its best given the others: the codes (columns, n), and what it left.

        Shapes: hessian (columns, columns); gradient, codes (n, columns); steps, lows (n, runs of
        ``run`` columns).
        """
        fused = fused_kernels.find(gradient.device)
        if fused is not None:
            parts = fused.sweep_codes(self.levels, run, hessian, gradient, codes, steps, lows)
            chosen, *rest = (part.T.contiguous() for part in parts)
            return chosen, Tile(hessian, *rest)
        found = codes.T.clone(memory_format=torch.contiguous_format)
        levels = self.levels.values[found.long()]
        every = torch.arange(len(found), device=found.device) // run
        steps, lows = steps.T.contiguous(), lows.T.contiguous()
        values = steps[every] * levels - lows[every]
        pull = gradient.T.clone(memory_format=torch.contiguous_format)
        tile = Tile(hessian, pull, levels, values)
        lost = steps == 0
        for j in range(len(found)):
            step, low, row = steps[j // run], lows[j // run], hessian[j]
            best = values[j] + pull[j] / row[j]
            code, level = self.levels.nearest((best + low) / step)
            found[j] = torch.where(lost[j // run], found[j], code)
            levels[j] = torch.where(lost[j // run], levels[j], level)
            value = step * levels[j] - low
            pull -= row[:, None] * (value - values[j])
            values[j] = value
        return found, tile

    def sweep(
        self, hessian: torch.Tensor, gradient: torch.Tensor, codes: torch.Tensor, d: torch.Tensor,
        scales: torch.Tensor, dmin: torch.Tensor | None, mins: torch.Tensor | None, *,
        change_scales: bool,
    ) -> tuple[torch.Tensor, Scales]:  # fmt: skip
        """`ScalarKernels.sweep`: the codes, and with ``change_scales`` other scales."""
        kernels, columns = self.kernels, len(hessian)
        held = Scales(d, scales, dmin, mins)
        steps, lows = held.steps()
        found, tile = self.sweep_codes(kernels.sub, hessian, gradient, codes, steps, lows)
        if change_scales:
            block = kernels.block or columns
            held = held.turned()
            sweep_scales(tile, held, kernels.sub, block, kernels.scale_range, kernels.min_range)
            for number in range(columns // block if kernels.half else 0):
                fit_block(tile, held, number, kernels.sub, block)
            held = held.turned()
        return found.T.contiguous(), held


@dataclass
class Scales:
    """Two levels of scales: d, dmin (n, blocks) and scales, mins (n, runs), or turned."""

    d: torch.Tensor
    scales: torch.Tensor
    dmin: torch.Tensor | None = None
    mins: torch.Tensor | None = None

    def steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a run's levels are multiplied by, and what is taken off, each (n, runs)."""
        runs = self.scales.shape[1] // self.d.shape[1]
        step = self.d.repeat_interleave(runs, dim=1) * self.scales
        if self.dmin is None or self.mins is None:
            return step, torch.zeros_like(step)
        return step, self.dmin.repeat_interleave(runs, dim=1) * self.mins

    def turned(self) -> Scales:
        """With the other axis first, in memory of its own."""
        return Scales(
            *(
                None if part is None else part.T.clone(memory_format=torch.contiguous_format)
                for part in (self.d, self.scales, self.dmin, self.mins)
            )
        )


def sweep_scales(
    tile: Tile, held: Scales, sub: int, block: int, scale_range: tuple[int, int],
    min_range: tuple[int, int], *, odd: bool = False,
) -> None:  # fmt: skip
    """Each run's integer scale, and minimum where there is one, to its optimum; ``held`` turned."""
    runs = block // sub
    for number in range(len(held.scales)):
        own = slice(number * sub, (number + 1) * sub)
        hessian = tile.hessian[own, own]
        d = held.d[number // runs]
        if scale_range[0] < scale_range[1]:
            levels = tile.levels[own]
            slope = d * (levels * tile.gradient[own]).sum(0)
            curvature = d * d * (levels * (hessian.T @ levels)).sum(0)
            scale = _move(held.scales[number], slope, curvature, scale_range, odd=odd)
            tile.change(own, (scale - held.scales[number]) * d * levels)
            held.scales[number] = scale
        if held.mins is not None and held.dmin is not None and min_range[0] < min_range[1]:
            dmin = held.dmin[number // runs]
            slope = -dmin * tile.gradient[own].sum(0)
            mins = _move(held.mins[number], slope, dmin * dmin * hessian.sum(), min_range)
            change = (held.mins[number] - mins) * dmin
            tile.change(own, change.expand(sub, -1))
            held.mins[number] = mins


def fit_block(tile: Tile, held: Scales, number: int, sub: int, block: int) -> None:
    """Least squares for d, or d and dmin, of one block, taken where float16 ones are better."""
    own = slice(number * block, (number + 1) * block)
    runs = slice(number * block // sub, (number + 1) * block // sub)
    rows, pull = tile.hessian[own], tile.gradient[own]
    a = held.scales[runs].repeat_interleave(sub, dim=0) * tile.levels[own]
    along = rows.T @ a
    aa, ga = (a * along[own]).sum(0), (a * pull).sum(0)
    b = None if held.mins is None else -held.mins[runs].repeat_interleave(sub, dim=0)
    d = held.d[number]
    if b is None or held.dmin is None:
        t = _divide(ga, aa)
        new = (d + t).half().float()
        moved = new - d
        better = 2 * moved * ga - moved * moved * aa > 0
        moved = torch.where(better, moved, 0)
        held.d[number] = torch.where(better, new, d)
        tile.gradient -= moved * along
        tile.values[own] += moved * a
        return
    against = rows.T @ b
    bb, gb, ab = (b * against[own]).sum(0), (b * pull).sum(0), (a * against[own]).sum(0)
    determinant = aa * bb - ab * ab
    apart = determinant > 1e-6 * aa * bb
    t = torch.where(apart, (ga * bb - gb * ab) / determinant, _divide(ga, aa))
    u = torch.where(apart, (gb * aa - ga * ab) / determinant, 0)
    dmin = held.dmin[number]
    new, least = (d + t).half().float(), (dmin + u).half().float()
    moved, lowered = new - d, least - dmin
    gain = 2 * (moved * ga + lowered * gb) - (
        moved * moved * aa + 2 * moved * lowered * ab + lowered * lowered * bb
    )
    better = gain > 0
    moved, lowered = torch.where(better, moved, 0), torch.where(better, lowered, 0)
    held.d[number] = torch.where(better, new, d)
    held.dmin[number] = torch.where(better, least, dmin)
    tile.gradient -= moved * along + lowered * against
    tile.values[own] += moved * a + lowered * b


def _divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b > 0, a / b, 0)


def _move(
    number: torch.Tensor, slope: torch.Tensor, curvature: torch.Tensor, limits: tuple[int, int],
    *, odd: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The integer (odd) nearest to number + slope / curvature, within the limits."""
    wanted = number + _divide(slope, curvature)
    wanted = torch.where(wanted < limits[1], wanted, float(limits[1]))
    wanted = torch.where(wanted > limits[0], wanted, float(limits[0]))
    if odd:
        return 2 * (0.5 * (wanted - 1)).round_() + 1
    return wanted.round_() + 0.0
