"""The nearest code of a block format's grid to numbers in the grid's own units, in torch.

Of a scalar format this is the nearest level; of a codebook the nearest point with signs for four or
eight weights together, with an even number of minus signs among eight where the format has room
for seven bits only. Points of IQ1 have no signs; in IQ1_S four of them share a shift.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.formats.codebook_lattice import CODEBOOKS, SIGNS_SHIFT, CodebookLattice
from quantcli.formats.grids import load_grid
from quantcli.formats.lattice import LATTICES
from quantcli.formats.search import Codes
from quantcli.rounding.scalar_codebook import ScalarCodebook


class Projection(Protocol):
    """From latents, float32 (..., weights of a code), to codes (...), int64, and back."""

    @property
    def gap(self) -> float:
        """The mean distance of neighbouring levels."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which a latent stays, so that it can come back."""

    @property
    def costs(self) -> int:
        """About how many products a weight takes."""

    def ranks(self, codes: Codes) -> NDArray[np.int64]:
        """The format's own codes as those of this projection."""

    def codes(self, ranks: NDArray[np.int64]) -> Codes:
        """The reverse of `ranks`."""

    def points(self, ranks: torch.Tensor) -> torch.Tensor:
        """What codes stand for, in the grid's units."""

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        """The codes nearest to latents."""


@cache
def projection_of(format_name: str) -> Projection:
    """That of a block format with codes."""
    if format_name in CODEBOOKS and CODEBOOKS[format_name].shift:
        return _ShiftedPoints.of(CODEBOOKS[format_name])
    if format_name in CODEBOOKS:
        return _Points.of(CODEBOOKS[format_name])
    return _Levels.of(ScalarCodebook.of(LATTICES[format_name]))


@dataclass(frozen=True)
class _Levels:
    """Weights coded one by one; ranks are places in the rising order of levels."""

    levels: torch.Tensor
    middles: torch.Tensor
    order: Codes
    places: NDArray[np.int64]

    @classmethod
    def of(cls, table: ScalarCodebook) -> _Levels:
        levels = torch.from_numpy(np.array(table.levels, np.float32))
        middles = (levels[1:] + levels[:-1]) / 2
        return cls(levels, middles, table.order, table.ranks.astype(np.int64))

    @property
    def gap(self) -> float:
        return float((self.levels[-1] - self.levels[0]) / (len(self.levels) - 1))

    @property
    def bounds(self) -> tuple[float, float]:
        return float(self.levels[0]) - self.gap / 2, float(self.levels[-1]) + self.gap / 2

    @property
    def costs(self) -> int:
        return 1

    def ranks(self, codes: Codes) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.places[codes]
        return found

    def codes(self, ranks: NDArray[np.int64]) -> Codes:
        found: Codes = self.order[ranks]
        return found

    def points(self, ranks: torch.Tensor) -> torch.Tensor:
        return self.levels[ranks][..., None]

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(latents[..., 0], self.middles)


_GROUPS = 1 << 14
"""Whose distances to all points are in memory at once."""


@dataclass(frozen=True)
class _Table(ABC):
    """Points of a grid; ranks are the codes themselves."""

    table: torch.Tensor
    half_squares: torch.Tensor

    @property
    @abstractmethod
    def gap(self) -> float:
        """`Projection.gap`."""

    @property
    def bounds(self) -> tuple[float, float]:
        far = float(self.table.max()) + self.gap / 2
        return -far, far

    @property
    def costs(self) -> int:
        return len(self.table)

    def ranks(self, codes: Codes) -> NDArray[np.int64]:
        return codes.astype(np.int64)

    def codes(self, ranks: NDArray[np.int64]) -> Codes:
        return ranks.astype(np.int32)


@dataclass(frozen=True)
class _Points(_Table):
    """Points of a grid with signs."""

    even: bool

    @classmethod
    def of(cls, lattice: CodebookLattice) -> _Points:
        table = torch.from_numpy(np.array(lattice.points, np.float32))
        return cls(table, table.square().sum(dim=1) / 2, lattice.even_signs)

    @property
    def gap(self) -> float:
        levels = self.table.unique()
        return float((levels[-1] - levels[0]) / (len(levels) - 1))

    @property
    def _shifts(self) -> torch.Tensor:
        return SIGNS_SHIFT + torch.arange(self.table.shape[1])

    def points(self, ranks: torch.Tensor) -> torch.Tensor:
        size = self.table[ranks & ((1 << SIGNS_SHIFT) - 1)]
        minus = ranks[..., None] >> self._shifts & 1
        return torch.where(minus.bool(), -size, size)

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        group = self.table.shape[1]
        flat = latents.reshape(-1, group)
        sizes = flat.abs()
        nearest = torch.cat(
            [
                (part @ self.table.T - self.half_squares).argmax(dim=1)
                for part in sizes.split(_GROUPS)
            ]
        )
        minus = flat < 0
        if self.even:
            minus = self._even(minus, sizes * self.table[nearest])
        signs = (minus.long() << self._shifts).sum(dim=1)
        return (nearest | signs).view(latents.shape[:-1])

    def _even(self, minus: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
        """The signs of eights with the cheapest one turned where their number is odd."""
        eights, price = minus.reshape(-1, 8), costs.reshape(-1, 8)
        odd = eights.sum(dim=1) % 2 == 1
        turned = torch.zeros_like(eights)
        turned[odd, price[odd].argmin(dim=1)] = True
        return (eights ^ turned).view(minus.shape)


@dataclass(frozen=True)
class _ShiftedPoints(_Table):
    """Points of a grid without signs, shifted up and, behind these, down.

    Every latent by itself is nearest to a level of the grid; where these make up one of its points,
    which they mostly do, there is nothing to search.
    """

    index: torch.Tensor
    """Of levels -1, 0 and 1, the first one counting ones, the next threes, the point or -1."""
    together: int
    """Groups that share a shift."""

    @classmethod
    def of(cls, lattice: CodebookLattice) -> _ShiftedPoints:
        table = torch.from_numpy(np.array(lattice.points, np.float32))
        together = lattice.sub // lattice.group if lattice.shared_shift else 1
        index = torch.from_numpy(load_grid(lattice.grid).index)
        return cls(table, table.square().sum(dim=1) / 2, index, together)

    @property
    def gap(self) -> float:
        """That of the grid: the levels of one shift are one apart."""
        return 1.0

    def points(self, ranks: torch.Tensor) -> torch.Tensor:
        return self.table[ranks]

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        flat = latents.reshape(-1, self.table.shape[1])
        half = len(self.table) // 2
        both = [self._nearest(flat, slice(0, half)), self._nearest(flat, slice(half, None))]
        (up, above), (down, below) = both
        gain = (below - above).view(-1, self.together).sum(dim=1)
        lower = (gain > 0).repeat_interleave(self.together)
        return torch.where(lower, down + half, up).view(latents.shape[:-1])

    def _nearest(self, flat: torch.Tensor, half: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest of half of the points, and how near: product less half a square."""
        points, squares = self.table[half], self.half_squares[half]
        # The first point's levels tell the shift: an eighth from whole numbers.
        shift = points[0, 0] - points[0, 0].round()
        levels = (flat - shift).round().clamp(-1, 1).long() + 1
        found = self.index[(levels * 3 ** torch.arange(flat.shape[1])).sum(dim=1)]
        off = (found < 0).nonzero()[:, 0]
        for part in off.split(_GROUPS):
            found[part] = (flat[part] @ points.T - squares).argmax(dim=1)
        return found, (flat * points[found]).sum(dim=1) - squares[found]
