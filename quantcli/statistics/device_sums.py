"""Sums of products that stay on an accelerator until all windows of a layer are through.

A product is as large as the Hessian that it is added to, so copying each window's to the host and
adding it there would take many times as long as the product itself. On the CPU no product is held,
but what is above the diagonal waits until all are added.
Where the device has no room for another sum, all leave it and are added up anew.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from quantcli.layerwise.devices import widest
from quantcli.layerwise.products import add_gram, mirror

_ROWS = 2048
"""Rows that are copied at once, so that the host never holds a second sum."""


class DeviceSums:
    """Sums that will be added to arrays of the host.

    ``hold`` None holds those of products that are not on the CPU.
    """

    def __init__(self, *, hold: bool | None = None) -> None:
        self._hold = hold
        self._held: dict[int, tuple[NDArray[Any], torch.Tensor]] = {}
        self._halves: dict[int, NDArray[Any]] = {}

    def add(self, into: NDArray[Any], values: torch.Tensor, inside: slice = slice(None)) -> None:
        """Add ``values.T @ values`` to the square of ``into`` that ``inside`` cuts out.

        ``into`` is the same array each time, float64 or float32, symmetric, whole after `leave`.
        """
        key = int(into.__array_interface__["data"][0])
        if not (values.device.type != "cpu" if self._hold is None else self._hold):
            add_gram(into, values, inside)
            self._halves[key] = into
            return
        product = values.T @ values
        if key not in self._held:
            self._held[key] = into, self._make_room(into, product)
        self._held[key][1][inside, inside] += product

    def leave(self) -> None:
        """Add all sums to their arrays, and hold none."""
        for into, held in self._held.values():
            for start in range(0, len(held), _ROWS):
                part = slice(start, start + _ROWS)
                into[part] += held[part].cpu().numpy()
        for into in self._halves.values():
            mirror(into)
        self.forget()

    def forget(self) -> None:
        """Let all sums go."""
        self._held.clear()
        self._halves.clear()

    def _make_room(self, into: NDArray[Any], product: torch.Tensor) -> torch.Tensor:
        wide = widest(product.device) if into.dtype.itemsize > 4 else torch.float32
        try:
            return torch.zeros(into.shape, dtype=wide, device=product.device)
        except torch.OutOfMemoryError:
            if not self._held:
                raise
        self.leave()
        return torch.zeros(into.shape, dtype=wide, device=product.device)
