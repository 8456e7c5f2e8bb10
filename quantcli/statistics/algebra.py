"""Where Hessians are factored and losses computed: on the host, or on an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from quantcli.layerwise.devices import is_accelerated, torch_device
from quantcli.statistics.device_hessian import DeviceFisher, DeviceStatistics, prepare_on_device
from quantcli.statistics.hessian import Hessian, prepare_hessian
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.statistics.output_fisher import OutputFisher


@dataclass(frozen=True)
class Algebra:
    """The functions and classes of one place: `prepare_hessian` (of a mean, damping and order),
    `MatrixStatistics` and `OutputFisher`, or what stands for them on a device."""

    prepare: Callable[..., Hessian]
    statistics: type[MatrixStatistics]
    fisher: Callable[..., OutputFisher]


HOST = Algebra(prepare_hessian, MatrixStatistics, OutputFisher)


def find_algebra(device: str) -> Algebra:
    """That of a `quantcli.layerwise.devices` name."""
    if not is_accelerated(device):
        return HOST
    place = torch_device(device)
    return Algebra(
        partial(prepare_on_device, device=place), DeviceStatistics,
        partial(DeviceFisher, device=place),
    )  # fmt: skip
