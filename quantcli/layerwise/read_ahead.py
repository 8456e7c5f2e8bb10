"""Weights of the next layer, read while an accelerator works on the present one.

They wait in pages that CUDA and XPU copy from by themselves, so that the copy does not stop the
host either. On the CPU nothing is read ahead: there the reading would take the cores from the
products, and the layer's memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

_PINS = ("cuda", "xpu")


class ReadAhead:
    """Tensors of the host by name, which ``read`` gives, for a ``device``."""

    def __init__(self, read: Callable[[str], torch.Tensor], device: torch.device) -> None:
        self._read = read
        self._pins = device.type in _PINS
        self._waiting: dict[str, Future[torch.Tensor]] = {}

    def begin(self, names: Iterable[str]) -> None:
        """Read these in a thread of their own; what was begun before and not taken is let go."""
        self._forget()
        reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._waiting = {name: reader.submit(self._load, name) for name in names}
        reader.shutdown(wait=False)

    def take(self, name: str) -> torch.Tensor:
        """A tensor, once it is read; one that was not begun is read now. Errors are ``read``'s."""
        begun = self._waiting.pop(name, None)
        return self._read(name) if begun is None else begun.result()

    def _load(self, name: str) -> torch.Tensor:
        found = self._read(name)
        return found.pin_memory() if self._pins else found

    def _forget(self) -> None:
        for begun in self._waiting.values():
            begun.cancel()
        self._waiting.clear()
