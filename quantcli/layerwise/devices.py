"""Where a model is run and its weights are rounded: the CPU, or an accelerator that torch drives.

A name is ``cpu``, ``cuda``, ``xpu`` or ``mps``, with ``:N`` for one of several. On ``cpu`` the
native kernels round; on anything else torch does (`quantcli.rounding.device`). ``cpu:torch`` has
torch do it on the CPU as well: slowly, and only to compare the two.

Apple's ``mps`` has no float64, so sums that are in float64 elsewhere are in float32 there, and
matrices are factored on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantcli.errors import DeviceError, UsageError
from quantcli.ranks.group import local_rank

NAMES = ("auto", "cpu", "cuda", "xpu", "mps")
_TORCH_ON_CPU = "cpu:torch"


def choose_device(name: str | None) -> str:
    """The device of a name, ``auto`` (or None) being CUDA or XPU where there is one, else the CPU.

    Where several ranks run on a machine, each takes the one of its number.

    UsageError when the one asked for is not there.
    """
    local = local_rank()
    if name is None or name == "auto":
        found = next((kind for kind in ("cuda", "xpu") if _count(kind)), "cpu")
        return found if found == "cpu" or local is None else choose_device(f"{found}:{local}")
    if name in NAMES[2:4] and local is not None:
        return choose_device(f"{name}:{local}")
    kind, _, number = name.partition(":")
    if name in ("cpu", _TORCH_ON_CPU):
        return name
    if kind not in NAMES[2:]:
        raise UsageError(f"there is no device {name!r}", hint=_choices())
    if ":" in name and not (number.isascii() and number.isdigit()):
        raise UsageError(f"{number!r} is no number of a {kind} device", hint=f"such as {kind}:0")
    count = _count(kind)
    if count == 0:
        raise UsageError(f"torch finds no {_WORDS[kind]} device here", hint="--device cpu")
    if number and int(number) >= count:
        last = f"{kind}:{count - 1}" if count > 1 else f"{kind}:0, the only one"
        raise UsageError(f"torch finds no device {name} here", hint=f"the last is {last}")
    return name


_WORDS = {"cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}


def _choices() -> str:
    return f"{', '.join(NAMES[:-1])} or {NAMES[-1]}; cuda:1 for the second of several"


def _count(kind: str) -> int:
    """How many devices of a kind torch finds."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def torch_device(name: str) -> torch.device:
    """torch's device of a name."""
    return torch.device("cpu" if name == _TORCH_ON_CPU else name)


def is_accelerated(name: str) -> bool:
    """Whether torch rounds there, rather than the native kernels."""
    return name != "cpu"


def widest(device: torch.device) -> torch.dtype:
    """The widest float that a device computes with: float64, but for Apple's."""
    return torch.float32 if device.type == "mps" else torch.float64


def factoring(device: torch.device) -> torch.device:
    """Where matrices are factored that lie on a device."""
    return torch.device("cpu") if device.type == "mps" else device


def remark(name: str) -> str | None:
    """What a user should know of a device that lacks something."""
    if torch_device(name).type == "mps":
        return "mps has no float64: sums are in float32 there, and matrices are factored on the CPU"
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None for the CPU, and where torch does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "xpu" and hasattr(torch.xpu, "mem_get_info"):
        return int(torch.xpu.mem_get_info(device)[0])
    return None


@contextmanager
def device_errors(name: str) -> Iterator[None]:
    """Give what a device cannot do a sentence: DeviceError for no memory, or a missing operation.

    The CPU's errors pass as they are.
    """
    try:
        yield
    except RuntimeError as failed:
        if name in ("cpu", _TORCH_ON_CPU):
            raise
        if isinstance(failed, torch.OutOfMemoryError) or "out of memory" in str(failed).lower():
            raise DeviceError(
                f"{name} has not enough memory for this layer",
                hint="let no other program use it, take a larger one, or --device cpu; layers that "
                "are done are kept for --resume",
            ) from failed
        if isinstance(failed, NotImplementedError):
            raise DeviceError(
                f"torch cannot do this on {name}: {str(failed).splitlines()[0]}",
                hint="--device cpu",
            ) from failed
        raise
