"""A device that stands in for an accelerator where there is none: torch's ``meta``.

Tensors there have shapes and no values. What would come back from a device (copies to the CPU, the
truth of a comparison) is made up, so that a whole run goes through; and every operation that is
given tensors of two devices is refused, as a GPU would refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantcli.layerwise import devices

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class MixedDevicesError(Exception):
    """Tensors of two devices met in one operation."""


class _StandIn(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        """How many ran on the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in taken if tensor.dim()}
        if "meta" not in {tensor.device.type for tensor in taken}:
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return _scalar(taken[0])
        with self:
            apart = func.decompose(*args, **kwargs)
        if apart is not NotImplemented:
            return apart
        if func in _COPIES:
            return _copy(func, args, kwargs)
        if len(kinds) > 1:
            raise MixedDevicesError(f"{func} of {[(t.device.type, *t.shape) for t in taken]}")
        self.operations += 1
        if func is _aten.equal.default:
            return args[0].shape == args[1].shape
        if func is _aten._unique2.default:
            one = args[0].new_zeros(1)
            return one, torch.zeros_like(args[0]), one
        if func is _aten.linalg_cholesky_ex.default:
            # Whether it succeeded is a value.
            return torch.empty_like(args[0]), torch.zeros((), dtype=torch.int32)
        return func(*args, **kwargs)


def _scalar(tensor: torch.Tensor) -> Any:
    return True if tensor.dtype == torch.bool else 1


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A copy from the device or to it; what comes back is made up."""
    if func is _aten.copy_.default:
        into, given = args[:2]
        if into.device.type == given.device.type:
            return func(*args, **kwargs)
        return into if into.device.type == "meta" else into.copy_(_values(given, into.dtype))
    to = kwargs.get("device") or args[0].device
    if torch.device(to).type == "meta" or args[0].device.type != "meta":
        return func(*args, **kwargs)
    return _values(args[0], kwargs.get("dtype") or args[0].dtype)


def _values(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values as such a tensor may have them: squares positive definite, codes in range."""
    if not dtype.is_floating_point:
        return torch.zeros(tensor.shape, dtype=dtype)
    found = torch.rand(tensor.shape) * 0.1 + 0.01
    if tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]:
        found = found @ found.T / len(found) + torch.eye(len(found))
    return found.to(dtype)


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[_StandIn]:
    """``meta`` as a device that can be asked for; yields what counts its operations."""
    monkeypatch.setattr(devices, "NAMES", (*devices.NAMES, "meta"))
    monkeypatch.setattr(devices, "_count", lambda kind: int(kind == "meta"))
    data, storage = torch.Tensor.data_ptr, torch.UntypedStorage.data_ptr

    def place(tensor: torch.Tensor) -> int:
        # Weights and inputs are recognised by their memory, and here is none.
        if tensor.device.type != "meta":
            return data(tensor)
        return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.itemsize

    def whole(memory: torch.UntypedStorage) -> int:
        return memory._cdata if memory.device.type == "meta" else storage(memory)

    monkeypatch.setattr(torch.Tensor, "data_ptr", place)
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", whole)
    mode = _StandIn()
    with mode:
        yield mode
