"""Whether Triton's kernels take the place of loops over columns, and which kinds of device have it.

A loop over 256 columns is some two thousand operations on a few numbers each, and on a GPU
starting each costs more than doing it. Where torch comes with Triton (CUDA and XPU builds do) one
kernel does the whole loop; elsewhere the loops of `quantcli.rounding.device.scalar_kernels` do the
same.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch

ENABLED = True
"""Whether it may, where it is there; to measure what it is worth."""
_KINDS = ("cuda", "xpu")


def find(device: torch.device) -> ModuleType | None:
    """The module of Triton kernels; None where torch's own operations are to be used."""
    if not ENABLED or device.type not in _KINDS or find_spec("triton") is None:
        return None
    from quantcli.rounding.device import triton_kernels

    return triton_kernels
