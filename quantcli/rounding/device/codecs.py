"""Codecs on a device: what `quantcli.rounding.codecs` rounds, on tensors that lie there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quantcli.formats.base import Bytes, Floats
from quantcli.rounding.codecs import BlockCodec, GridCodec, ScaledBlockCodec, WeightCodec
from quantcli.rounding.device.block_feedback import (
    TensorMatrix,
    open_codebook,
    retarget,
    round_blocks,
    sweep_blocks,
)
from quantcli.rounding.device.grid_feedback import GridWork, round_grid, sweep_grid
from quantcli.rounding.options import Options
from quantcli.statistics.device_hessian import TensorHessian
from quantcli.workers import Workers


class RoundedRows(Protocol):
    """Some rows that were rounded and may be swept again."""

    @property
    def values(self) -> torch.Tensor:
        """The weights that are stored, (n, columns)."""

    def refine(self, rows: torch.Tensor) -> RoundedRows:
        """After another sweep, towards other ``rows``."""

    def pack(self) -> Bytes:
        """Packed rows of the codec."""


class DeviceCodec(Protocol):
    """`quantcli.rounding.codecs.WeightCodec` for rows that lie on a device."""

    def descend(
        self, rows: torch.Tensor, hessian: TensorHessian, importance: Floats, options: Options,
        pool: Workers,
    ) -> RoundedRows:  # fmt: skip
        """GPTQ and the sweeps after it."""


def sweeps_after(options: Options, hessian: TensorHessian) -> int:
    """`Options.sweeps_after`."""
    return options.sweeps + (options.block_sweeps if hessian.order is not None else 0)


@dataclass(frozen=True)
class _Blocks:
    """Rows in a block format; they are ``scale`` times what the matrix holds."""

    matrix: TensorMatrix
    hessian: TensorHessian
    scale: float

    @property
    def values(self) -> torch.Tensor:
        found = torch.cat([self.matrix.grid.values(parts) for parts in self.matrix.parts], 1)
        return found * self.scale if self.scale != 1 else found

    def refine(self, rows: torch.Tensor) -> RoundedRows:
        found = retarget(self.matrix, rows / self.scale if self.scale != 1 else rows)
        sweep_blocks(found, self.hessian)
        return _Blocks(found, self.hessian, self.scale)

    def pack(self) -> Bytes:
        return self.matrix.pack()


@dataclass(frozen=True)
class DeviceBlockCodec:
    """A block format, weights divided by ``scale`` before."""

    codec: BlockCodec
    scale: float = 1.0

    def descend(
        self, rows: torch.Tensor, hessian: TensorHessian, importance: Floats, options: Options,
        pool: Workers,
    ) -> RoundedRows:  # fmt: skip
        """`BlockCodec.descend`."""
        grid = open_codebook(self.codec.format, rows.device)
        given = rows / self.scale if self.scale != 1 else rows
        matrix = TensorMatrix(self.codec.format, grid, given)
        round_blocks(matrix, hessian, importance, pool, options.block_sweeps)
        for _ in range(sweeps_after(options, hessian)):
            sweep_blocks(matrix, hessian)
        return _Blocks(matrix, hessian, self.scale)


@dataclass(frozen=True)
class _OnGrid:
    work: GridWork
    codec: GridCodec

    @property
    def values(self) -> torch.Tensor:
        return self.work.values(slice(0, self.work.rows.shape[1]))

    def refine(self, rows: torch.Tensor) -> RoundedRows:
        found = self.work.retarget(rows)
        sweep_grid(found)
        return _OnGrid(found, self.codec)

    def pack(self) -> Bytes:
        return self.codec.pack(self.work.result())


@dataclass(frozen=True)
class DeviceGridCodec:
    """A grid of a model folder."""

    codec: GridCodec

    def descend(
        self, rows: torch.Tensor, hessian: TensorHessian, importance: Floats, options: Options,
        pool: Workers,
    ) -> RoundedRows:  # fmt: skip
        """`GridCodec.descend`."""
        work = GridWork.of(rows, self.codec.grid, hessian, pool)
        round_grid(work, importance, options.block_sweeps)
        for _ in range(sweeps_after(options, hessian)):
            sweep_grid(work)
        return _OnGrid(work, self.codec)


def find_device_codec(codec: WeightCodec) -> DeviceCodec | None:
    """The codec on a device; None for one that is not of this package."""
    if isinstance(codec, ScaledBlockCodec):
        return DeviceBlockCodec(codec, float(codec.scale))
    if isinstance(codec, BlockCodec):
        return DeviceBlockCodec(codec)
    return DeviceGridCodec(codec) if isinstance(codec, GridCodec) else None
