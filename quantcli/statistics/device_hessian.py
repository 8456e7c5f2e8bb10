"""A Hessian that lies on an accelerator, factored there, and the losses under it.

What the host asks for (the matrix, for a plug-in's rounder or a drift) is copied when it is asked
for. See `quantcli.statistics.hessian` for what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.base import Floats
from quantcli.layerwise.devices import factoring, widest
from quantcli.layerwise.steady import cholesky
from quantcli.statistics.hessian import (
    DAMPING,
    WIDE,
    ColumnOrder,
    Hessian,
    fill_dead,
    raise_damping,
)
from quantcli.statistics.losses import Judge
from quantcli.statistics.matrix_statistics import ExactJudge, MatrixStatistics
from quantcli.statistics.output_fisher import DAMPING as OUTPUT_DAMPING
from quantcli.statistics.output_fisher import OutputFisher, cut_strips

_ELEMENTS = 1 << 24
"""Of an error matrix, that a loss takes at once."""


@dataclass(frozen=True, eq=False)
class TensorHessian:
    """`Hessian` as tensors of one device; ``order`` is int64, None for columns as they are."""

    matrix: torch.Tensor
    factor: torch.Tensor
    pivots: torch.Tensor
    damping: float
    order: torch.Tensor | None
    _parts: dict[Any, torch.Tensor] = field(default_factory=dict)
    _together: dict[int, TensorHessian] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.matrix.device

    def part(self, columns: slice) -> torch.Tensor:
        """I + U of some neighbouring columns alone, contiguous."""
        return self._keep(("factor", columns.start), lambda: self.factor[columns, columns])

    def metric(self, columns: slice, width: int) -> torch.Tensor:
        """For each unit of ``width`` of the columns (I + U) D (I + U)^T, (columns, width)."""

        def make() -> torch.Tensor:
            units = (columns.stop - columns.start) // width
            tiled = self.part(columns).reshape(units, width, units, width)
            every = torch.arange(units, device=self.device)
            own = tiled[every, :, every, :]
            pivots = self.pivots[columns].reshape(units, 1, width)
            return ((own * pivots) @ own.mT).reshape(-1, width)

        return self._keep(("metric", columns.start, columns.stop, width), make)

    def own(self, columns: slice) -> torch.Tensor:
        """The matrix of some neighbouring columns alone, contiguous."""
        return self._keep(("own", columns.start), lambda: self.matrix[columns, columns])

    def keep_together(self, width: int) -> TensorHessian:
        """`Hessian.keep_together`."""
        if self.order is None or width == 1:
            return self
        if width not in self._together:
            loud = self.matrix.diagonal().cpu().numpy().reshape(-1, width).sum(axis=1)
            units = np.argsort(-loud, kind="stable")
            order = (units[:, None] * width + np.arange(width)).reshape(-1)
            wide = self.matrix.to(widest(self.device))
            found = _factor(wide, order)
            if found is None:
                raise SourceError("a Hessian is not positive definite")
            self._together[width] = TensorHessian(
                self.matrix, *found, self.damping, _indices(order, self.device)
            )
        return self._together[width]

    def _keep(self, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._parts:
            self._parts[key] = make().contiguous()
        return self._parts[key]


class DeviceHessian(Hessian):
    """A `Hessian` whose numbers lie on a device as ``tensors``; the host's arrays are copies."""

    def __init__(self, tensors: TensorHessian, order: ColumnOrder | None) -> None:
        self.__dict__.update(
            tensors=tensors, damping=tensors.damping, order=order, _parts={}, _together={}
        )

    tensors: TensorHessian

    @cached_property
    def matrix(self) -> Floats:
        """A copy."""
        return _array(self.tensors.matrix)

    @cached_property
    def factor(self) -> Floats:
        """A copy."""
        return _array(self.tensors.factor)

    @cached_property
    def pivots(self) -> Floats:
        """A copy."""
        return _array(self.tensors.pivots)


def prepare_on_device(
    mean: NDArray[np.floating[Any]], damping: float = DAMPING, order: str = "natural", *,
    device: torch.device,
) -> DeviceHessian:  # fmt: skip
    """`quantcli.statistics.hessian.prepare_hessian`, on a device."""
    wide = torch.float32 if len(mean) >= WIDE else widest(device)
    values = torch.from_numpy(np.ascontiguousarray(mean)).to(device).to(wide, copy=True)
    alive, average = fill_dead(mean.diagonal().astype(np.float64))
    sorting = np.argsort(-alive, kind="stable") if order == "activation" else None
    while True:
        damped = torch.from_numpy(alive + damping * average).to(wide)
        values.diagonal().copy_(damped.to(device))
        found = _factor(values, sorting)
        if found is not None:
            break
        damping = raise_damping(damping)
    places = None if sorting is None else _indices(sorting, device)
    return DeviceHessian(TensorHessian(values.float(), *found, damping, places), sorting)


def _factor(
    values: torch.Tensor, order: ColumnOrder | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """I + U and D in an order, float32; None where the matrix is not positive definite."""
    home, device = values.device, factoring(values.device)
    if order is None:
        turned = values.flip(0, 1)
    else:
        places = _indices(order[::-1].copy(), home)
        turned = values[places][:, places]
    turned = turned.to(device)
    if device.type == "cpu":
        try:
            lower = cholesky(turned)
        except torch.linalg.LinAlgError:
            return None
    else:
        lower, info = torch.linalg.cholesky_ex(turned)
        if bool(info.any()):
            return None
    del turned
    upper = lower.to(home).flip(0, 1)
    del lower
    diagonal = upper.diagonal().clone()
    return upper.div_(diagonal).float(), (diagonal * diagonal).float()


@dataclass(frozen=True)
class DeviceStatistics(MatrixStatistics):
    """`MatrixStatistics` whose losses are computed where the Hessian lies."""

    @cached_property
    def _judge(self) -> torch.Tensor:
        return _tensor(np.asarray(self.held_out), self._device)

    @property
    def _device(self) -> torch.device:
        if not isinstance(self.hessian, DeviceHessian):
            raise ValueError("the Hessian lies on the host")
        return self.hessian.tensors.device

    def cost(self, errors: Floats, outputs: OutputFisher | None) -> float:
        """`MatrixStatistics.cost`."""
        return self.cost_of(_tensor(errors, self._device), outputs)

    def judge(self, rows: int, outputs: OutputFisher | None) -> Judge:
        """`MatrixStatistics.judge`, which is exact here: products are what a device does best."""
        return ExactJudge(self, outputs)

    def cost_of(self, errors: torch.Tensor, outputs: OutputFisher | None) -> float:
        """The same of errors that lie on the device."""
        weighed = outputs.weigh_on_device(errors) if isinstance(outputs, DeviceFisher) else errors
        total, step = 0.0, max(1, _ELEMENTS // errors.shape[1])
        for start in range(0, len(errors), step):
            rows = slice(start, start + step)
            product = (weighed[rows] @ self._judge) * errors[rows]
            total += float(product.sum(dtype=widest(errors.device)))
        return total


@dataclass(frozen=True, eq=False)
class DeviceFisher(OutputFisher):
    """`OutputFisher` that is factored, and weighs, on a device."""

    device: torch.device

    def _prepare(self, mean: Floats) -> Hessian:
        return prepare_on_device(mean, OUTPUT_DAMPING, "activation", device=self.device)

    @cached_property
    def _means(self) -> tuple[torch.Tensor, ...]:
        return tuple(_tensor(mean, self.device) for mean in self.means)

    def weigh_on_device(self, errors: torch.Tensor) -> torch.Tensor:
        """F times ``errors`` (rows, columns)."""
        parts = zip(self._means, cut_strips(self.rows), strict=True)
        return torch.cat([mean @ errors[strip] for mean, strip in parts])


def _indices(order: ColumnOrder, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(order)).to(device)


def _tensor(values: Floats, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)


def _array(values: torch.Tensor) -> Floats:
    found: Floats = values.cpu().numpy()
    return found
