"""Gradients by what layers leave for later ones, on the way back through the layers.

A layer that takes keys and values out of a mapping gives gradients by them as well, which wait
until the walk comes back to the layer that put them in.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from typing import Any

import torch

States = dict[Hashable, tuple[torch.Tensor, ...]]


class SharedGradients:
    """One layer's backward pass: `cut` before it runs, `roots` after it, `add` at last.

    ``mappings`` are those that the layer is called with, ``waiting`` the gradients of one window
    that later layers gave.
    """

    def __init__(self, mappings: Sequence[MutableMapping[Any, Any]], waiting: States) -> None:
        self._mappings = mappings
        self._waiting = waiting
        self._leaves: States = {}

    def cut(self) -> None:
        """Make what the layer may take out the end of its graph."""
        for mapping in self._mappings:
            for key, states in mapping.items():
                self._leaves[key] = tuple(state.clone().requires_grad_(True) for state in states)
                mapping[key] = self._leaves[key]

    def roots(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the layer put in, and the gradients by it."""
        for mapping in self._mappings:
            for key, states in mapping.items():
                if states is not self._leaves.get(key) and key in self._waiting:
                    yield from zip(states, self._waiting.pop(key), strict=True)

    def add(self) -> None:
        """Add the gradients by what the layer took out to those that wait."""
        for key, states in self._leaves.items():
            if all(state.grad is None for state in states):
                continue
            found = [torch.zeros_like(s) if s.grad is None else s.grad for s in states]
            before = self._waiting.get(key)
            if before is not None:
                found = [one + other for one, other in zip(found, before, strict=True)]
            self._waiting[key] = tuple(found)
