"""A packed tensor whose codes and scales can be trained: every state of it is a state of the grid.

Beside the code, the integer scale and the float16 scale of every block stands a real offset; the
values are those of the nearest whole codes and float16 numbers, and gradients pass the rounding as
if it were not there (a straight-through estimator, arXiv:1308.3432). So what is trained is what
will be stored, bit by bit. Offsets move by Adam (arXiv:1412.6980).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantcli.formats import get_format
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.lattice import LATTICES, Parts
from quantcli.formats.search import Codes
from quantcli.rounding.scalar_codebook import ScalarCodebook

TRAVEL = {"codes": 0.4, "scales": 0.5, "mins": 0.5, "d": 0.04, "dmin": 0.04}
"""How far an offset can go in all: codes and whole scales in steps, d and dmin as a share."""
_EDGE = 0.35
"""Where a weight lies between two codes, it starts at most this far from the one it has."""
_BETAS = (0.9, 0.99)
"""Of Adam's two means. Bare signs would move every code alike, so all would cross at once."""
_HALF_MAX = 65504.0


def is_trainable(format_name: str) -> bool:
    """Whether this block format has a code for each weight and float16 scales."""
    return format_name in LATTICES and LATTICES[format_name].half


@dataclass(frozen=True)
class State:
    """Offsets by what they belong to; a copy can be kept and taken up again."""

    offsets: dict[str, torch.Tensor]

    def copy(self) -> State:
        """The same offsets, to be kept."""
        return State({name: offset.clone() for name, offset in self.offsets.items()})


class Trainable:
    """The tensor in ``packed`` (rows, row bytes); ``rows`` (n, columns) are the original weights.

    Offsets start so that the values are those in ``packed``.
    """

    def __init__(self, format_name: str, packed: Bytes, rows: Floats, device: str = "cpu") -> None:
        self._format = get_format(format_name)
        self._lattice = lattice = LATTICES[format_name]
        self._table = ScalarCodebook.of(lattice)
        self._shape = rows.shape
        parts = lattice.split(packed.reshape(-1, self._format.nbytes))
        rank = np.searchsorted(self._table.levels, lattice.levels)

        def real(values: Any) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)

        self._levels = real(self._table.levels)
        self._slopes = real(np.gradient(self._table.levels))
        self._start = {"codes": real(rank[parts.codes]), "scales": real(parts.scales)}
        self._start["d"] = real(parts.d)
        self._ranges = {"codes": (0, len(self._table.levels) - 1), "scales": lattice.scale_range}
        if parts.dmin is not None and parts.mins is not None:
            self._start |= {"dmin": real(parts.dmin), "mins": real(parts.mins)}
            self._ranges["mins"] = lattice.min_range or (0, 0)
        fixed = [name for name, (low, high) in self._ranges.items() if low == high]
        self.state = State({
            name: torch.zeros_like(start)
            for name, start in self._start.items() if name not in fixed
        })  # fmt: skip
        self.state.offsets["codes"] += self._lean(real(rows))

        self._count = 0
        self._moments = {
            name: (torch.zeros_like(offset), torch.zeros_like(offset))
            for name, offset in self.state.offsets.items()
        }

    def _lean(self, rows: torch.Tensor) -> torch.Tensor:
        """Where in its code's range each original weight lies, in steps from the middle."""
        step, low = self._steps()
        codes = self._start["codes"].long().view(*step.shape, -1)
        aim = rows.reshape(codes.shape) + low[:, :, None]
        wide = (step[:, :, None] * self._slopes[codes]).nan_to_num()
        lean = (aim - step[:, :, None] * self._levels[codes]) / wide
        return lean.nan_to_num(0, 0, 0).clamp(-_EDGE, _EDGE).view(self._start["codes"].shape)

    def _whole(self, name: str) -> torch.Tensor:
        start, offset = self._start[name], self.state.offsets.get(name)
        if offset is None:
            return start
        if name in self._ranges:
            return (start + offset).round().clamp(*self._ranges[name])
        near = (start * (1 + offset)).clamp(-_HALF_MAX, _HALF_MAX)
        return near.half().float()

    def _steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        step = self._whole("d")[:, None] * self._whole("scales")
        if "mins" not in self._start:
            return step, torch.zeros_like(step)
        return step, self._whole("dmin")[:, None] * self._whole("mins")

    def values(self) -> torch.Tensor:
        """The weights as they will be decoded, float32 (n, columns)."""
        step, low = self._steps()
        levels = self._levels[self._whole("codes").long()].view(*step.shape, -1)
        return (step[:, :, None] * levels - low[:, :, None]).view(self._shape)

    def descend(self, gradient: torch.Tensor, share: float) -> None:
        """Move every offset by up to ``share`` of its travel against ``gradient``, of `values`."""
        step, _ = self._steps()
        gradient = gradient.reshape(*step.shape, -1)
        codes = self._whole("codes").long().view(gradient.shape)
        of_step = (gradient * self._levels[codes]).sum(dim=2)
        found = {
            "codes": (gradient * step[:, :, None]).view(self._start["codes"].shape),
            "scales": of_step * self._whole("d")[:, None],
            "d": (of_step * self._whole("scales")).sum(dim=1) * self._start["d"],
        }
        if "mins" in self._start:
            of_low = -gradient.sum(dim=2)
            found["mins"] = of_low * self._whole("dmin")[:, None]
            found["dmin"] = (of_low * self._whole("mins")).sum(dim=1) * self._start["dmin"]
        self._count += 1
        for name, offset in self.state.offsets.items():
            mean, square = self._moments[name]
            mean.lerp_(found[name], 1 - _BETAS[0])
            square.lerp_(found[name].square(), 1 - _BETAS[1])
            size = (square / (1 - _BETAS[1] ** self._count)).sqrt()
            way = (mean / (1 - _BETAS[0] ** self._count) / size).nan_to_num(0, 0, 0)
            offset.sub_(way, alpha=share * TRAVEL[name])
            if name in self._ranges:
                first, last = self._ranges[name]
                start = self._start[name]
                offset.copy_((start + offset).clamp(first - _EDGE, last + _EDGE) - start)

    def pack(self) -> Bytes:
        """The packed rows of the present state, uint8 (n, row bytes)."""

        def whole(name: str) -> Codes:
            return np.asarray(self._whole(name).cpu().numpy(), np.int32)

        minimums = "mins" in self._start
        parts = Parts(
            self._whole("d").cpu().numpy(),
            whole("scales"),
            self._table.order[whole("codes")],
            self._whole("dmin").cpu().numpy() if minimums else None,
            whole("mins") if minimums else None,
        )
        return self._lattice.join(parts).reshape(self._shape[0], -1)
