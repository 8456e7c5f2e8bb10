"""GPTQ on a device: `quantcli.rounding.gptq`, feedback among rows included, on tensors.

The rows of a matrix go to the device once, and packed rows come back. Groups of rows are those of
the native back end, so that the codes can be the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from quantcli.formats.base import Bytes, Floats
from quantcli.layerwise.devices import factoring, is_accelerated
from quantcli.rounding.base import Rounder
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.device.codecs import DeviceCodec, RoundedRows, find_device_codec
from quantcli.rounding.gptq import GPTQ
from quantcli.rounding.options import Options
from quantcli.rounding.row_feedback import cut_groups
from quantcli.statistics.device_hessian import DeviceHessian, TensorHessian
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.statistics.output_fisher import cut_strips
from quantcli.workers import Workers


class _DeviceGptq:
    """GPTQ as a `Rounder` that works where the Hessians lie."""

    name, options, needs = GPTQ.name, GPTQ.options, GPTQ.needs

    def fits(self, codec: WeightCodec) -> bool:
        """Those whose codes can be chosen one by one."""
        return GPTQ.fits(codec)

    def round(
        self, codec: WeightCodec, rows: Floats, statistics: MatrixStatistics, options: Options,
        pool: Workers,
    ) -> Bytes:  # fmt: skip
        """`GPTQ.round`; a codec or statistics that are not of this package stay on the host."""
        own = find_device_codec(codec)
        if own is None or not isinstance(statistics.hessian, DeviceHessian):
            return GPTQ.round(codec, rows, statistics, options, pool)
        hessian, importance = statistics.hessian.tensors, statistics.importance
        given = torch.from_numpy(np.ascontiguousarray(rows)).to(hessian.device)
        if statistics.outputs is None:
            return own.descend(given, hessian, importance, options, pool).pack()
        packed: Bytes | None = None
        prepared = statistics.outputs.prepared
        for strip, fisher in zip(cut_strips(len(rows)), prepared, strict=True):
            if not isinstance(fisher, DeviceHessian) or fisher.order is None:
                raise ValueError("the outputs' Hessian has no order, or lies on the host")
            found = _round_strip(
                own, given[strip], hessian, importance, fisher.tensors, options, pool
            )
            if packed is None:
                packed = np.empty((len(rows), found.shape[1]), np.uint8)
            packed[strip.start + fisher.order] = found
        if packed is None:
            raise ValueError("no rows")
        return packed


DEVICE_GPTQ = _DeviceGptq()


def on_device(rounder: Rounder, device: str) -> Rounder:
    """The rounder that does the same on a device, where there is one."""
    return DEVICE_GPTQ if rounder is GPTQ and is_accelerated(device) else rounder


def _round_strip(
    codec: DeviceCodec, strip: torch.Tensor, hessian: TensorHessian, importance: Floats,
    fisher: TensorHessian, options: Options, pool: Workers,
) -> Bytes:  # fmt: skip
    """Packed rows of a strip, in the order of ``fisher``; `row_feedback._round_strip`."""
    order = fisher.order
    if order is None:
        raise ValueError("the outputs' Hessian has no order")
    rows = strip[order]
    groups = cut_groups(len(rows))
    errors = torch.zeros_like(rows)
    parts: list[RoundedRows] = []
    first = replace(options, sweeps=max(0, options.sweeps - 1))
    for group in groups:
        before = slice(0, group.start)
        aim = rows[group] + fisher.factor[before, group].T @ errors[before]
        parts.append(codec.descend(aim, hessian, importance, first, pool))
        errors[group] = rows[group] - parts[-1].values
    for number, group in enumerate(groups if options.sweeps else ()):
        tied = fisher.matrix[order[group]][:, order]
        share = _solve(tied[:, group], tied)
        aim = rows[group] + (share @ errors - errors[group])
        parts[number] = parts[number].refine(aim)
        errors[group] = rows[group] - parts[number].values
    return np.concatenate([part.pack() for part in parts])


def _solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The solution of a X = b, where the device's matrices are factored."""
    where = factoring(a.device)
    return torch.linalg.solve(a.to(where), b.to(where)).to(a.device)
