"""`quantcli.rounding.kernels.VectorKernels` as torch operations, all rows at once.

The best point of a unit is found by looking at every point, in two tables of what the halves of
points gain, as in ``native/kernels/points.c``; all scales that a run is tried with are tried
together. Sums run in the native kernels' order, so on the CPU the codes are theirs bit by bit.
Tensors have rows first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from quantcli.formats.base import Bytes, Floats
from quantcli.formats.codebook_lattice import SIGNS_SHIFT, CodebookLattice
from quantcli.rounding.device.scalar_kernels import Scales, Tile, fit_block, sweep_scales

_CAUTION = (1.0, 1.5)
"""How much longer than the diagonal alone would have it a step's metric is taken to be."""


@dataclass(frozen=True, eq=False)
class TensorPoints:
    """A grid's points (points, group), and those of its halves; ``signs`` none, free or even.

    With ``apart`` the second half of the points is the first one, each level moved by that, and a
    run takes its points from one half alone.
    """

    values: torch.Tensor
    halves: tuple[torch.Tensor, torch.Tensor]
    patterns: tuple[torch.Tensor, torch.Tensor]
    signs: str
    apart: float
    width: int
    _bits: torch.Tensor = field(repr=False)

    @classmethod
    def of(cls, lattice: CodebookLattice, width: int, device: torch.device) -> TensorPoints:
        """Those of a format."""
        points, half = lattice.points, lattice.group // 2
        (first, one), (second, two) = (
            np.unique(part, axis=0, return_inverse=True)
            for part in (points[:, :half], points[:, half:])
        )
        patterns = np.stack([one, two], axis=1).astype(np.uint8)
        return cls.make(first, second, patterns, lattice.signs, lattice.apart, width, device)

    @classmethod
    def make(
        cls, first: Floats, second: Floats, patterns: Bytes, signs: str, apart: float, width: int,
        device: torch.device,
    ) -> TensorPoints:  # fmt: skip
        """Points as `VectorKernels` has them."""
        one, two = (torch.from_numpy(np.ascontiguousarray(half)).to(device)
                    for half in (first, second))  # fmt: skip
        a, b = (torch.from_numpy(patterns[:, i].astype(np.int64)).to(device) for i in (0, 1))
        values = torch.cat([one[a], two[b]], 1)
        bits = SIGNS_SHIFT + torch.arange(values.shape[1], dtype=torch.int32, device=device)
        return cls(values, (one, two), (a, b), signs, apart, width, bits)

    @property
    def group(self) -> int:
        """Weights under one code."""
        return int(self.values.shape[1])

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Levels with signs, (n, columns), of codes (n, groups)."""
        points = self.values[(codes & ((1 << SIGNS_SHIFT) - 1)).long()]
        minus = (codes[..., None] >> self._bits & 1).bool()
        return torch.where(minus, -points, points).flatten(1)

    def norms(self, diagonal: torch.Tensor) -> torch.Tensor:
        """Squared lengths of the points under a diagonal metric (columns,): (groups, points)."""
        return diagonal.reshape(-1, self.group) @ (self.values * self.values).T

    @property
    def searched(self) -> int:
        """The points of one half where there are two that lie apart, else all."""
        return len(self.values) // 2 if self.apart else len(self.values)

    def nearest(
        self, norms: torch.Tensor, diagonal: torch.Tensor, target: torch.Tensor,
        latter: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Levels (n, width) and codes (n, groups) of the units nearest under a diagonal metric.

        ``norms`` are those of the unit's groups, ``diagonal`` and ``target`` have its weights.
        ``latter`` (n,) says which units take the second half's points, if these lie apart.
        """
        signed, group = self.signs != "none", self.group
        if latter is not None:
            target = target - torch.where(latter, self.apart, 0.0)[:, None]
        minus = target < 0 if signed else torch.zeros_like(target, dtype=torch.bool)
        slope = 2 * diagonal * (target.abs() if signed else target)
        odd = minus.sum(1) % 2 == 1 if self.signs == "even" else None
        parts = slope.split(group, dim=1)
        if len(parts) == 1:
            found, turned = [self._search(norms[0], parts[0], odd)[0]], [odd]
        else:
            plain = [self._search(*each, None) for each in zip(norms, parts, strict=True)]
            found, turned = [code for code, _ in plain], [None, None]
            if odd is not None:
                other = [self._search(*each, odd) for each in zip(norms, parts, strict=True)]
                cost = [there[1] - here[1] for here, there in zip(plain, other, strict=True)]
                second = cost[1] < cost[0]
                turned = [odd & ~second, odd & second]
                found = [
                    torch.where(turn, there[0], code)
                    for turn, there, code in zip(turned, other, found, strict=True)
                ]
        levels, codes = [], []
        own = zip(found, turned, parts, minus.split(group, dim=1), strict=True)
        for found_code, turn, part, sign in own:
            code = found_code if latter is None else found_code + latter.long() * self.searched
            points = self.values[code]
            if turn is not None:
                place = (part * points).argmin(1, keepdim=True)
                flips = torch.zeros_like(sign).scatter_(1, place, turn[:, None])
                sign = sign ^ flips
            levels.append(torch.where(sign, -points, points))
            bits = (sign.to(torch.int32) << self._bits).sum(1, dtype=torch.int32)
            codes.append(code.to(torch.int32) | bits)
        return torch.cat(levels, 1), torch.stack(codes, 1)

    def _search(
        self, norms: torch.Tensor, slope: torch.Tensor, odd: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Points of lowest norm - slope * point, and that; where ``odd`` with a sign turned."""
        half = self.group // 2
        gains, turns = [], []
        for number, levels in enumerate(self.halves):
            part = slope[:, number * half : (number + 1) * half]
            terms = [part[:, i, None] * levels[:, i] for i in range(half)]
            total, least = terms[0], terms[0]
            for term in terms[1:]:
                total = total + term
                least = torch.where(term < least, term, least)
            patterns = self.patterns[number][: self.searched]
            gains.append(total[:, patterns])
            if odd is not None:
                turn = torch.where(odd[:, None], 2 * least, 0.0)
                turns.append(turn[:, patterns])
        gain = gains[0] + gains[1]
        if turns:
            gain = gain - torch.where(turns[0] < turns[1], turns[0], turns[1])
        scores = norms[: self.searched] - gain
        best = scores.argmin(1)
        return best, scores.gather(1, best[:, None])[:, 0]

    def improve(
        self, norms: torch.Tensor, metric: torch.Tensor, gradient: torch.Tensor,
        levels: torch.Tensor, codes: torch.Tensor, latter: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Steps along the gradient (n, width) under a unit's whole metric, where they gain.

        Returns gradient, levels and codes; the first two are divided by the step.
        """
        diagonal = metric.diagonal()
        for caution in _CAUTION:
            target = levels + gradient / (caution * diagonal)
            other, chosen = self.nearest(norms, diagonal, target, latter)
            other = other - levels
            along = _multiply(other, metric)
            gains = other * (2 * gradient - along)
            better = _sum(gains) > 0
            levels = levels + torch.where(better[:, None], other, 0.0)
            gradient = gradient - torch.where(better[:, None], along, 0.0)
            codes = torch.where(better[:, None], chosen, codes)
        return gradient, levels, codes


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Sums of rows from a zero, one element after the other."""
    total = torch.zeros_like(values[:, 0])
    for i in range(values.shape[1]):
        total = total + values[:, i]
    return total


def _multiply(values: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """``values @ metric.T``, summed in the order of the columns."""
    total = torch.zeros_like(values)
    for k in range(values.shape[1]):
        total = total + values[:, k, None] * metric[:, k]
    return total


@dataclass(frozen=True, eq=False)
class TensorVectorKernels:
    """`VectorKernels` on a device."""

    points: TensorPoints
    sub: int
    block: int
    scale_range: tuple[int, int]

    def feedback(
        self, run: int, spread: int, target: torch.Tensor, weights: torch.Tensor,
        factor: torch.Tensor, metric: torch.Tensor, d: torch.Tensor, scales: torch.Tensor,
        norms: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """`VectorKernels.feedback`: codes (n, groups), errors (n, columns) and scales (n, runs).

        ``d`` is (n, 1). ``norms`` (groups, points) follow from the metric.
        """
        points, (rows, columns) = self.points, target.shape
        width, groups = points.width, points.width // points.group
        if norms is None:
            units = metric.reshape(-1, width, width)
            norms = points.norms(units.diagonal(dim1=1, dim2=2))
        x, scales, most = target.clone(), scales.clone(), self.scale_range[1]
        errors = torch.empty_like(x)
        shape = rows, columns // points.group
        codes = torch.empty(shape, dtype=torch.int32, device=x.device)
        around = range(-spread, spread + 1)
        moves, count = [0, *(move for move in around if move)], 2 * spread + 1
        latter = None
        if points.apart:
            moves += around
            latter = (torch.arange(len(moves), device=x.device) >= count).repeat_interleave(rows)
        for number, start in enumerate(range(0, columns, run)):
            own = slice(start, start + run)
            middle = scales[:, number]
            tried = torch.stack([middle + 2.0 * move for move in moves])
            steps = (d[:, 0] * tried).reshape(-1)
            found = self._round_run(
                x[:, own].repeat(len(moves), 1), weights[:, own].repeat(len(moves), 1),
                factor[own, own], metric[own], norms[start // points.group :], steps, groups,
                latter,
            )  # fmt: skip
            chosen, missed, losses = (
                part.reshape(len(moves), rows, *part.shape[1:]) for part in found
            )
            least, best, lost, scale = losses[0], chosen[0], missed[0], middle
            for index in range(1, len(moves)):
                held = (tried[index] >= 1) & (tried[index] <= most) | (moves[index] == 0)
                better = held & (losses[index] < least)
                least = torch.where(better, losses[index], least)
                scale = torch.where(better, tried[index], scale)
                best = torch.where(better[:, None], chosen[index], best)
                lost = torch.where(better[:, None], missed[index], lost)
            codes[:, start // points.group : own.stop // points.group] = best
            errors[:, own], scales[:, number] = lost, scale
            for k in range(run):
                x[:, own.stop :] += lost[:, k, None] * factor[start + k, own.stop :]
        return codes, errors, scales

    def _round_run(
        self, x: torch.Tensor, w: torch.Tensor, factor: torch.Tensor, metric: torch.Tensor,
        norms: torch.Tensor, steps: torch.Tensor, groups: int, latter: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Codes, errors, and what they add to the loss, of a run under one step for each row."""
        points, width, step = self.points, self.points.width, steps[:, None]
        codes, errors, loss = [], torch.empty_like(x), torch.zeros_like(steps)
        for unit, start in enumerate(range(0, x.shape[1], width)):
            own = slice(start, start + width)
            within = factor[own, own]
            fed = x[:, own] - w[:, own]
            # Where the unit's own errors are to be made good too, rather than only passed on.
            for k in range(width - 1):
                fed[:, k + 1 :] -= fed[:, k, None] * within[k, k + 1 :]
            ratio = (w[:, own] + fed) / step
            mine, length = metric[own], norms[unit * groups : (unit + 1) * groups]
            levels, chosen = points.nearest(length, mine.diagonal(), ratio, latter)
            gradient = _multiply(ratio - levels, mine)
            gradient, levels, chosen = points.improve(
                length, mine, gradient, levels, chosen, latter
            )
            terms = step * step * (ratio - levels) * gradient
            for i in range(width):
                loss = loss + terms[:, i]
            errors[:, own] = w[:, own] - step * levels
            codes.append(chosen)
            for k in range(width):
                x[:, own.stop :] += errors[:, start + k, None] * factor[start + k, own.stop :]
        return torch.cat(codes, 1), errors, loss

    def sweep(
        self, hessian: torch.Tensor, gradient: torch.Tensor, codes: torch.Tensor, d: torch.Tensor,
        scales: torch.Tensor, *, change_scales: bool, norms: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Scales]:  # fmt: skip
        """`VectorKernels.sweep`: the codes, and with ``change_scales`` other scales.

        ``norms`` (groups, points) follow from the Hessian.
        """
        points, held = self.points, Scales(d, scales)
        width, groups = points.width, points.width // points.group
        if norms is None:
            norms = points.norms(hessian.diagonal())
        steps, _ = held.steps()
        codes, pull = codes.clone(), gradient.clone()
        levels = points.levels(codes)
        values = steps.repeat_interleave(self.sub, dim=1) * levels
        for unit, start in enumerate(range(0, len(hessian), width)):
            own, mine = slice(start, start + width), slice(unit * groups, (unit + 1) * groups)
            step = steps[:, start // self.sub, None]
            lost = step == 0
            latter = codes[:, unit * groups] >= points.searched if points.apart else None
            _, found, chosen = points.improve(
                norms[mine], hessian[own, own], pull[:, own] / step, levels[:, own],
                codes[:, mine], latter,
            )  # fmt: skip
            levels[:, own] = torch.where(lost, levels[:, own], found)
            codes[:, mine] = torch.where(lost, codes[:, mine], chosen)
            changes = step * levels[:, own] - values[:, own]
            values[:, own] = step * levels[:, own]
            for i in range(width):
                pull -= changes[:, i, None] * hessian[start + i]
        if change_scales:
            tile = Tile(hessian, *(part.T.contiguous() for part in (pull, levels, values)))
            held = held.turned()
            sweep_scales(tile, held, self.sub, self.block, self.scale_range, (0, 0), odd=True)
            for number in range(len(hessian) // self.block):
                fit_block(tile, held, number, self.sub, self.block)
            held = held.turned()
        return codes, held
