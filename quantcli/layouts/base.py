"""A model-folder layout: the grids it holds, how codes are packed, its settings, how it is run.

One `Layout` in one file says everything about a format, for quantizing, exporting, reading a folder
back, model cards and the command line; a line in `quantcli.layouts.LAYOUTS`, or an entry point in
the group ``quantcli.layouts``, adds it.

Codes come some rows at a time; a `Patch` says where in which tensor a piece of the result belongs,
so that no more than these rows need be in memory, whichever way the format turns the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.formats.integer import IntegerCodes, IntegerGrid, Strategy, Zero
from quantcli.layouts.settings import Settings
from quantcli.layouts.stored import PackedWeight, StoredTensors
from quantcli.types import Declared, Matrix, Note

DTYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

ROWS = 32
"""`Packing.place` gets multiples of so many rows, where words of zero points end, or the last."""


@dataclass(frozen=True, slots=True)
class Patch:
    """``values`` (rows, columns) belong at ``row``, ``column`` of the tensor seen as a matrix."""

    tensor: str
    values: NDArray[Any]
    row: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """What a written config.json depends on: the source's, the grid, and the linear modules.

    ``quantized`` and ``kept`` are the names of those that are quantized and those that are not.
    """

    config: Mapping[str, Any]
    grid: IntegerGrid
    quantized: Sequence[str]
    kept: Sequence[str]


def fits_always(matrix: Matrix, grid: IntegerGrid) -> str | None:
    """For a packing that takes any shape."""
    return None


@dataclass(frozen=True, slots=True)
class Packing:
    """How codes are stored.

    ``declare`` returns the tensors of a matrix, or of the stack that it is in. ``place`` takes a
    row number and the codes of the rows from there on, and yields what to write where. ``describe``
    returns the keys that it sets in config.json. ``refuse`` returns why a matrix cannot be packed,
    or None.
    """

    declare: Callable[[Matrix, IntegerGrid], Sequence[Declared]]
    place: Callable[[Matrix, IntegerGrid, int, IntegerCodes], Iterable[Patch]]
    describe: Callable[[FolderFacts], dict[str, Any]]
    refuse: Callable[[Matrix, IntegerGrid], str | None] = fits_always


@dataclass(frozen=True, slots=True)
class Grids:
    """Integer grids that a layout holds, and the packing of their codes.

    ``symmetric`` and ``asymmetric`` are the grids' zero points, None where there is no such grid;
    the first that is there is the default. ``groups`` are the sizes of groups, () for any multiple
    of 8 and None for none; ``strategies`` are the wider spans of a scale, and ``group`` is the
    default among all of them.
    """

    bits: tuple[int, ...]
    packing: Packing
    symmetric: Zero | None = None
    asymmetric: Zero | None = None
    group: int | Strategy = 128
    groups: tuple[int, ...] | None = ()
    strategies: tuple[Strategy, ...] = ()
    scale_dtype: str | None = None
    """Of scales; None: the model's own."""
    computes_in_scales: bool = False
    """Whether a runtime computes in the scales' dtype, so that a float32 model needs them wide."""
    lowest_zero: int = 0

    @property
    def usual_bits(self) -> int:
        """The default: 4 where there are such grids."""
        return 4 if 4 in self.bits else self.bits[0]

    def has_group(self, size: int) -> bool:
        """Whether so many weights of a row may share a scale."""
        return self.groups is not None and (
            size in self.groups or (not self.groups and size >= 8 and size % 8 == 0)
        )


_GRID_FIELDS = frozenset({"bits", "grid", "method", "keep", "dtype"})
_FLOAT_FIELDS = frozenset({"types", "method", "dtype"})


def serve(name: str) -> str:
    """The command that serves a folder with vLLM."""
    return f"vllm serve {name}"


def remark_nothing(grid: IntegerGrid, matrices: Sequence[Matrix]) -> Iterator[Note]:
    """No notes."""
    yield from ()


def remark_experts(grid: IntegerGrid, matrices: Sequence[Matrix]) -> Iterator[Note]:
    """A warning for quantized experts, which transformers 5 does not load from some layouts."""
    if any("_exps." in matrix.tensor for matrix in matrices):
        yield Note(
            "transformers 5 does not load experts from GPTQ and AWQ folders, and leaves them unset "
            "without an error; --to compressed-tensors is what it loads",
            "warning",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A model-folder format.

    ``grids`` are for float activations, None where no codes are stored; ``activations`` are the
    grids for activations that a runtime quantizes, by their name in a recipe. ``blocks`` packs the
    rows of a block format (uint8, in place of codes) as the same weights, by its name. ``read``
    returns a folder's quantized weights by name, if the ``quant_method`` of its settings is the
    layout's name; SourceError where it does not understand them. ``remark`` yields notes on what
    runtimes do with a grid and its matrices.
    """

    name: str
    help: str
    grids: Grids | None = None
    activations: Mapping[str, Grids] = field(default_factory=dict)
    blocks: Mapping[str, Packing] = field(default_factory=dict)
    read: Callable[[StoredTensors, Settings], Mapping[str, PackedWeight]] | None = None
    embeddings: bool = False
    """Whether the embedding and the head are quantized too."""
    stacked: bool = False
    """Whether a layer's experts are one tensor."""
    remark: Callable[[IntegerGrid, Sequence[Matrix]], Iterable[Note]] = remark_nothing
    usage: Callable[[str], str] = serve
    """The command that runs the folder of a name."""
    library: str = "transformers"
    """The library that a model card names."""
    header: str = "pt"
    """The ``format`` in the headers of the safetensors files."""

    @property
    def takes(self) -> frozenset[str]:
        """The sections and single fields of a recipe that it takes."""
        if self.grids is None:
            return _FLOAT_FIELDS
        return _GRID_FIELDS | {"activations"} if self.activations else _GRID_FIELDS


def as_stored(values: NDArray[Any], grid: IntegerGrid) -> NDArray[Any]:
    """Scales or edges in the dtype that they are exact in."""
    return np.ascontiguousarray(values, DTYPES[grid.scale_dtype])
