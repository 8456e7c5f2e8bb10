"""Codebook grids: the points that groups of four or eight weights are coded as.

The tables are `gguf`'s own (``gguf.quants``), the one source for the NumPy references and for the
C kernels, which are given them once, before they first meet a format that needs one. What a search
looks through is derived, not stored: for levels that are no point of the grid, the points in the
nearest few distances, by distance and then by index, because that order decides ties.

Source: iq2xs_init_impl and iq3xs_init_impl in ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli import _native
from quantcli.formats.base import Floats

Levels = NDArray[np.uint8]
Indices = NDArray[np.int64]

_SHELLS = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ1_S": 3, "IQ3_XXS": 2, "IQ3_S": 3}
"""Formats whose table gguf has, and from how many distances their neighbours are taken."""

_SHARED = {"IQ1_M": "IQ1_S"}
"""Formats that use another one's grid."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A codebook.

    A code is a number for a group's levels: those of the first weight count ones, those of the
    next ``len(values)``, and so on.
    """

    levels: Levels
    """The points' levels, shape (points, weights)."""
    values: NDArray[np.int8]
    """What each level decodes to."""
    shells: int

    @cached_property
    def points(self) -> Floats:
        """The points as they are decoded, shape (points, weights)."""
        points: Floats = self.values[self.levels].astype(np.float32)
        return points

    @cached_property
    def index(self) -> Indices:
        """Of each code the point with its levels, or -1."""
        table = np.full(len(self.values) ** self.levels.shape[1], -1)
        table[self.codes(self.levels)] = np.arange(len(self.levels))
        return table

    @cached_property
    def near(self) -> Indices:
        """Of each code the points in the ``shells`` nearest distances, nearest first.

        Shape (codes, longest list); a shorter list is filled up with its first entry.
        """
        found = [self._near(part) for part in np.array_split(np.arange(len(self.index)), 16)]
        longest = max(part.shape[1] for part in found)
        near = np.empty((len(self.index), longest), np.int64)
        near[:] = np.concatenate([part[:, :1] for part in found])
        start = 0
        for part in found:
            near[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return near

    def codes(self, levels: NDArray[Any]) -> Indices:
        """The codes of levels of shape (n, weights)."""
        codes: Indices = levels.astype(np.int64) @ self._place_values
        return codes

    @property
    def _place_values(self) -> Indices:
        return len(self.values) ** np.arange(self.levels.shape[1])

    def _near(self, codes: Indices) -> Indices:
        levels = codes[:, None] // self._place_values % len(self.values)
        steps = levels[:, None, :] - self.levels
        distance = (steps * steps).sum(axis=2)
        order = distance.argsort(axis=1, kind="stable")
        sorted_distance = np.take_along_axis(distance, order, axis=1)
        shell = np.cumsum(np.diff(sorted_distance, prepend=sorted_distance[:, :1]) > 0, axis=1)
        inside = shell < self.shells
        longest = inside.sum(axis=1).max()
        near: Indices = np.where(inside, order, order[:, :1])[:, :longest]
        return near


def has_grid(name: str) -> bool:
    """Whether a format is coded with a grid."""
    return name in _SHELLS or name in _SHARED


@cache
def load_grid(name: str) -> Grid:
    """The grid of a format, from gguf's table."""
    import gguf.quants  # takes a while to load, and most formats need nothing of it

    owner = _SHARED.get(name, name)
    table: Any = getattr(gguf.quants, owner)
    table.init_grid()
    values = np.array(table.grid_map, np.float32)
    points: Floats = table.grid.reshape(table.grid_shape)
    levels = np.searchsorted(values, points).astype(np.uint8)
    return Grid(np.ascontiguousarray(levels), values.astype(np.int8), _SHELLS[owner])


def install_grid(name: str, type_id: int) -> None:
    """Give the kernels the grid of a format."""
    grid = load_grid(name)
    _native.set_grid(type_id, grid.levels, grid.values)
