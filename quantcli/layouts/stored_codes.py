"""The codes of a quantized weight as they are stored, for whoever writes them elsewhere.

A storage that lies on one of quantcli's grids says which, and reads codes, scales and zero points
of rows without decoding. What lies on none (ordered groups, lookup tables) has no such thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import Codes, GridCodes, IntegerGrid, Strategy

if TYPE_CHECKING:
    from quantcli.layouts.stored import StoredTensors

Ranges = tuple[NDArray[np.float32], NDArray[Any] | None]
"""Scales (rows, groups), float32, and zero points or edges of the same shape."""


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """The grid of a weight, and reads of some of its rows, leading axes flattened.

    ``codes`` gives what the grid stores, ``ranges`` scales and zeros with a row for each of the
    rows, whatever they share; both take the tensors, a first row and a last. ``whole`` gives
    NVFP4's scale of the matrix as it is stored, by which the others are divided, or multiplied
    where it ``multiplies``. ``order`` gives the group of each column of an ordered grid.
    """

    grid: IntegerGrid | FloatGrid
    codes: Callable[[StoredTensors, int, int], Codes]
    ranges: Callable[[StoredTensors, int, int], Ranges]
    whole: Callable[[StoredTensors], float] | None = None
    multiplies: bool = False
    order: Callable[[StoredTensors], NDArray[Any]] | None = None


@runtime_checkable
class CodedStore(Protocol):
    """A `TensorStore` some of whose weights are stored as codes of a grid."""

    @property
    def grids(self) -> Mapping[str, IntegerGrid | FloatGrid]:
        """The grid of each such weight by its name."""

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Stored scales of activations and caches, which belong to no weight."""

    def read_beside(self, name: str) -> NDArray[Any]:
        """One of those, as it is stored."""

    def read_codes(self, name: str, start: int, stop: int) -> GridCodes:
        """Rows of such a weight; scales are of each row."""

    def read_ranges(self, name: str, start: int, stop: int) -> Ranges:
        """Their scales and zeros alone."""

    def read_whole(self, name: str) -> tuple[float | None, bool]:
        """The scale of a whole weight as it is stored, and whether it multiplies the others."""


def divisor(whole: float | None, multiplies: bool) -> float | None:
    """By what the other scales are divided, rounded to float32 where that is not what is stored."""
    if whole is None or not multiplies:
        return whole
    with np.errstate(all="ignore"):
        return float(np.float32(1) / np.float32(whole))


def span_of(columns: int, group: int) -> tuple[Strategy, int | None]:
    """What shares a scale, as a grid says it, where so many of a row's ``columns`` do."""
    return ("channel", None) if group == columns else ("group", group)


def scale_kind(dtype: str) -> str:
    """A grid's ``scale_dtype`` of scales that are stored in ``dtype``."""
    return dtype if dtype in ("F32", "F16", "BF16") else "F32"
