"""Blocks of a format apart, as tensors of a device: `quantcli.formats.lattice.Parts` by rows.

Codes are what the kernels count: places among rising levels, or a point's number with its signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from quantcli.formats.base import Floats
from quantcli.formats.lattice import Parts
from quantcli.formats.search import Codes
from quantcli.rounding.device.point_kernels import TensorPoints, TensorVectorKernels
from quantcli.rounding.device.scalar_kernels import Scales, TensorScalarKernels
from quantcli.rounding.scalar_codebook import ScalarCodebook
from quantcli.rounding.vector_codebook import SPREAD, VectorCodebook
from quantcli.statistics.device_hessian import TensorHessian


@dataclass(frozen=True, eq=False)
class TensorParts:
    """A column block of n rows: ``codes`` (n, columns / group) under their scales (n, ...)."""

    codes: torch.Tensor
    held: Scales


class TensorCodebook(Protocol):
    """`ScalarCodebook` or `VectorCodebook` on a device."""

    @property
    def group(self) -> int:
        """Weights under one code."""

    @property
    def width(self) -> int:
        """Weights of a unit, which is chosen at once."""

    @property
    def together(self) -> int:
        """Weights that cannot be rounded apart."""

    @property
    def sub(self) -> int:
        """Weights under one scale."""

    def load(self, parts: Parts, rows: int) -> TensorParts:
        """Parts of the host, blocks of ``rows`` rows."""

    def unload(self, parts: TensorParts) -> Parts:
        """The same on the host."""

    def values(self, parts: TensorParts) -> torch.Tensor:
        """The weights, (n, columns)."""

    def round_columns(
        self, parts: TensorParts, target: torch.Tensor, weights: torch.Tensor,
        hessian: TensorHessian, columns: slice,
    ) -> TensorParts:  # fmt: skip
        """A column block rounded in order with feedback, the scales those of ``parts`` or near."""

    def feed_back(
        self, run: int, target: torch.Tensor, weights: torch.Tensor, hessian: TensorHessian,
        columns: slice, steps: torch.Tensor, lows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Codes and errors of columns that are rounded in order under given steps."""

    def sweep(
        self, parts: TensorParts, hessian: torch.Tensor, gradient: torch.Tensor
    ) -> TensorParts:
        """Parts after a sweep over a column block."""


def _load(values: Floats | Codes, rows: int, device: torch.device) -> torch.Tensor:
    found = np.ascontiguousarray(values.reshape(rows, -1), np.float32)
    return torch.from_numpy(found).to(device)


def _array(values: torch.Tensor) -> Floats:
    found: Floats = values.cpu().numpy()
    return found


def _integers(values: torch.Tensor, runs: int) -> Codes:
    return _array(values).reshape(-1, runs).astype(np.int32)


@dataclass(frozen=True, eq=False)
class TensorScalarCodebook:
    """Weights that are coded one by one."""

    own: ScalarCodebook
    kernels: TensorScalarKernels
    device: torch.device
    group = width = together = 1

    @classmethod
    def of(cls, own: ScalarCodebook, device: torch.device) -> TensorScalarCodebook:
        """The same on a device."""
        return cls(own, TensorScalarKernels.of(own.kernels, device), device)

    @property
    def sub(self) -> int:
        """Weights under one scale."""
        return self.own.lattice.sub

    def load(self, parts: Parts, rows: int) -> TensorParts:
        """Parts of the host, blocks of ``rows`` rows."""
        ranks = np.ascontiguousarray(self.own.ranks[parts.codes].reshape(rows, -1))
        d, scales = (_load(part, rows, self.device) for part in (parts.d, parts.scales))
        held = Scales(d, scales)
        if parts.dmin is not None and parts.mins is not None:
            dmin, mins = (_load(part, rows, self.device) for part in (parts.dmin, parts.mins))
            held = Scales(d, scales, dmin, mins)
        return TensorParts(torch.from_numpy(ranks).to(self.device), held)

    def unload(self, parts: TensorParts) -> Parts:
        """The same on the host."""
        lattice, held = self.own.lattice, parts.held
        runs = lattice.block // lattice.sub
        codes = self.own.order[_array(parts.codes)].reshape(-1, lattice.block)
        return Parts(
            _array(held.d).reshape(-1), _integers(held.scales, runs), codes,
            None if held.dmin is None else _array(held.dmin).reshape(-1),
            None if held.mins is None else _integers(held.mins, runs),
        )  # fmt: skip

    def values(self, parts: TensorParts) -> torch.Tensor:
        """The weights, (n, columns)."""
        steps, lows = (part.repeat_interleave(self.sub, dim=1) for part in parts.held.steps())
        return steps * self.kernels.levels.values[parts.codes.long()] - lows

    def round_columns(
        self, parts: TensorParts, target: torch.Tensor, weights: torch.Tensor,
        hessian: TensorHessian, columns: slice,
    ) -> TensorParts:  # fmt: skip
        """`ScalarCodebook.round_columns`."""
        steps, lows = parts.held.steps()
        codes, _ = self.feed_back(self.sub, target, weights, hessian, columns, steps, lows)
        return TensorParts(codes, parts.held)

    def feed_back(
        self, run: int, target: torch.Tensor, weights: torch.Tensor, hessian: TensorHessian,
        columns: slice, steps: torch.Tensor, lows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """`ScalarCodebook.feed_back`."""
        return self.kernels.feedback(run, target, weights, hessian.part(columns), steps, lows)

    def sweep(
        self, parts: TensorParts, hessian: torch.Tensor, gradient: torch.Tensor
    ) -> TensorParts:
        """`ScalarCodebook.sweep`."""
        held = parts.held
        found = self.kernels.sweep(
            hessian, gradient, parts.codes, held.d, held.scales, held.dmin, held.mins,
            change_scales=True,
        )  # fmt: skip
        return TensorParts(*found)


@dataclass(frozen=True, eq=False)
class TensorVectorCodebook:
    """Groups of weights that are points of a grid."""

    own: VectorCodebook
    kernels: TensorVectorKernels
    device: torch.device

    @classmethod
    def of(cls, own: VectorCodebook, device: torch.device) -> TensorVectorCodebook:
        """The same on a device."""
        points = TensorPoints.of(own.lattice, own.width, device)
        kernels = TensorVectorKernels(
            points, own.lattice.sub, own.lattice.block, own.lattice.scale_range
        )
        return cls(own, kernels, device)

    @property
    def group(self) -> int:
        """Weights under one code."""
        return self.own.group

    @property
    def width(self) -> int:
        """Weights of a unit."""
        return self.own.width

    @property
    def together(self) -> int:
        """Weights that cannot be rounded apart."""
        return self.own.together

    @property
    def sub(self) -> int:
        """Weights under one scale."""
        return self.own.lattice.sub

    def load(self, parts: Parts, rows: int) -> TensorParts:
        """Parts of the host, blocks of ``rows`` rows."""
        codes = np.ascontiguousarray(parts.codes.reshape(rows, -1), np.int32)
        d, scales = (_load(part, rows, self.device) for part in (parts.d, parts.scales))
        return TensorParts(torch.from_numpy(codes).to(self.device), Scales(d, scales))

    def unload(self, parts: TensorParts) -> Parts:
        """The same on the host."""
        lattice, held = self.own.lattice, parts.held
        return Parts(
            _array(held.d).reshape(-1),
            _integers(held.scales, lattice.block // lattice.sub),
            np.asarray(parts.codes.cpu().numpy()).reshape(-1, lattice.block // lattice.group),
        )

    def values(self, parts: TensorParts) -> torch.Tensor:
        """The weights, (n, columns)."""
        steps, _ = parts.held.steps()
        return steps.repeat_interleave(self.sub, dim=1) * self.kernels.points.levels(parts.codes)

    def round_columns(
        self, parts: TensorParts, target: torch.Tensor, weights: torch.Tensor,
        hessian: TensorHessian, columns: slice,
    ) -> TensorParts:  # fmt: skip
        """`VectorCodebook.round_columns`."""
        d = parts.held.d[:, :1]
        codes, _, scales = self.kernels.feedback(
            self.sub, SPREAD, target, weights, hessian.part(columns),
            hessian.metric(columns, self.width), d, parts.held.scales,
        )  # fmt: skip
        return TensorParts(codes, Scales(parts.held.d, scales))

    def feed_back(
        self, run: int, target: torch.Tensor, weights: torch.Tensor, hessian: TensorHessian,
        columns: slice, steps: torch.Tensor, lows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """`VectorCodebook.feed_back`."""
        codes, errors, _ = self.kernels.feedback(
            run, 0, target, weights, hessian.part(columns), hessian.metric(columns, self.width),
            torch.ones_like(target[:, :1]), steps,
        )  # fmt: skip
        return codes, errors

    def sweep(
        self, parts: TensorParts, hessian: torch.Tensor, gradient: torch.Tensor
    ) -> TensorParts:
        """`VectorCodebook.sweep`."""
        found = self.kernels.sweep(
            hessian, gradient, parts.codes, parts.held.d, parts.held.scales, change_scales=True
        )
        return TensorParts(*found)
