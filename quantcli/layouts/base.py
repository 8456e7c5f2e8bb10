"""What a packed format is to the loop that fills a model folder: tables of plain functions.

Codes come some rows at a time; `Patch` says where in which tensor a piece of the result belongs,
so that no more than these rows need be in memory, whichever way the format turns the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.safetensors_container import Declared
from quantcli.formats.integer import IntegerCodes, IntegerGrid
from quantcli.types import Matrix

DTYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

ROWS = 32
"""Rows are given in multiples of this, but for a matrix's last: a zero point's word ends there."""


@dataclass(frozen=True, slots=True)
class Patch:
    """``values`` (rows, columns) belong at ``row``, ``column`` of the tensor seen as a matrix."""

    tensor: str
    values: NDArray[Any]
    row: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """What a configuration describes: the source's config.json, the grid, and linear modules.

    ``quantized`` and ``kept`` are names of those that are quantized and those that are not.
    """

    config: Mapping[str, Any]
    grid: IntegerGrid
    quantized: Sequence[str]
    kept: Sequence[str]


@dataclass(frozen=True, slots=True)
class Packing:
    """A packed format.

    ``declare`` gives the tensors of one matrix, or of the stack that it is in. ``place`` takes the
    first row of the codes and gives what they become. ``describe`` gives what the output's
    config.json sets besides the source's. ``refuse`` says why a matrix cannot be packed, or gives
    None.
    """

    declare: Callable[[Matrix, IntegerGrid], Sequence[Declared]]
    place: Callable[[Matrix, IntegerGrid, int, IntegerCodes], Iterator[Patch]]
    describe: Callable[[Subject], dict[str, Any]]
    refuse: Callable[[Matrix, IntegerGrid], str | None]


def refuse_never(matrix: Matrix, grid: IntegerGrid) -> str | None:
    """For a format that takes any shape."""
    return None


def as_stored(values: NDArray[Any], grid: IntegerGrid) -> NDArray[Any]:
    """Scales or edges in the dtype that they are exact in."""
    return np.ascontiguousarray(values, DTYPES[grid.scale_dtype])
