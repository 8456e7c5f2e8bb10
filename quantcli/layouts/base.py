"""A model-folder layout: the grids it holds, how codes are packed, its settings, how it is run.

One `Layout` in one file says everything about a format, for quantizing, exporting, reading a folder
back, model cards and the command line; a line in `quantcli.layouts.LAYOUTS`, or an entry point in
the group ``quantcli.layouts``, adds it.

Codes come some rows at a time; a `Patch` says where in which tensor a piece of the result belongs,
so that no more than these rows need be in memory, whichever way the format turns the matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import GridCodes, IntegerGrid, Search, Strategy, Zero
from quantcli.layouts.settings import Settings
from quantcli.layouts.stored import PackedWeight, StoredTensors
from quantcli.types import Declared, Matrix, Note

DTYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

CodeGrid = IntegerGrid | FloatGrid

ROWS = 128
"""`Packing.place` gets multiples of so many rows, where words of zero points and blocks of FP8
scales end, or the last."""


@dataclass(frozen=True, slots=True)
class Patch:
    """``values`` (rows, columns) belong at ``row``, ``column`` of the tensor seen as a matrix."""

    tensor: str
    values: NDArray[Any]
    row: int = 0
    column: int = 0


def fits_always(matrix: Matrix, grid: CodeGrid) -> str | None:
    """For a packing that takes any shape."""
    return None


@dataclass(frozen=True, slots=True)
class Packing:
    """How codes are stored.

    ``declare`` returns the tensors of a matrix, or of the stack that it is in. ``place`` takes a
    row number and the codes of the rows from there on, and yields what to write where. ``describe``
    returns the keys that it sets in config.json. ``refuse`` returns why a matrix cannot be packed,
    or None. ``form`` is the container's name and ``weights`` what a group of the settings says of a
    grid, where a layout's folders may hold several.
    """

    declare: Callable[[Matrix, Any], Sequence[Declared]]
    place: Callable[[Matrix, Any, int, GridCodes], Iterable[Patch]]
    describe: Callable[[FolderFacts], dict[str, Any]]
    refuse: Callable[[Matrix, Any], str | None] = fits_always
    form: str = ""
    weights: Callable[[Any], dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Extremes:
    """The least and the largest of the values that were seen, zero among them."""

    low: float
    high: float

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    def join(self, other: Extremes) -> Extremes:
        """Those of both."""
        return Extremes(min(self.low, other.low), max(self.high, other.high))


def is_static(inputs: Mapping[str, Any] | None) -> bool:
    """Whether settings of activations have a scale that is found beforehand, on texts."""
    return inputs is not None and inputs["dynamic"] is not True


@dataclass(frozen=True, slots=True)
class InputScales:
    """Tensors beside a module for the scales of its activations, where they are found beforehand.

    ``declare`` takes the module's name, the activations' settings and the dtype of float scales;
    ``place`` besides what was seen of them.
    """

    declare: Callable[[str, Mapping[str, Any], str], Sequence[Declared]]
    place: Callable[[str, Mapping[str, Any], str, Extremes], Iterable[Patch]]


@dataclass(frozen=True, slots=True)
class CacheScales:
    """Tensors beside an attention module for the scales of its key-value cache.

    ``settings`` are what config.json says of the cache. ``declare`` takes the module's name and the
    dtype of scales, ``place`` besides the largest key and the largest value. ``describe`` returns
    what config.json says where nothing else is quantized. ``dtype`` is that of scales, "" the
    model's.
    """

    settings: Any
    declare: Callable[[str, str], Sequence[Declared]]
    place: Callable[[str, str, float, float], Iterable[Patch]]
    describe: Callable[[FolderFacts], dict[str, Any]]
    dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A scheme that a layout has under a name, such as "FP8_DYNAMIC".

    ``grid`` lacks the dtype of float scales where it is "", which is the model's. ``inputs`` are
    the settings of activations that a runtime quantizes. ``search`` is how scales are found unless
    a recipe says otherwise.
    """

    name: str
    help: str
    grid: CodeGrid
    packing: Packing
    inputs: Mapping[str, Any] | None = None
    search: Search = "mse"


@dataclass(frozen=True, slots=True)
class FolderPart:
    """Modules of a folder that have one grid and packing, and settings of their activations."""

    grid: CodeGrid
    packing: Packing
    inputs: Mapping[str, Any] | None
    modules: Sequence[str]


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """What a written config.json depends on: the source's, and the linear modules.

    ``parts`` are those that are quantized, ``kept`` the names of those that are not; ``cache`` is
    said of the key-value cache.
    """

    config: Mapping[str, Any]
    parts: Sequence[FolderPart]
    kept: Sequence[str]
    cache: Any = None

    @property
    def grid(self) -> IntegerGrid:
        """The grid of a folder of integers: of several that of most modules."""
        grid = self.usual.grid
        if not isinstance(grid, IntegerGrid):
            raise ValueError("the folder has no integer grid")
        return grid

    @property
    def usual(self) -> FolderPart:
        """The part with the most modules, whose settings stand for all that have none."""
        return max(self.parts, key=lambda part: len(part.modules))

    @property
    def others(self) -> Sequence[FolderPart]:
        """The other parts."""
        return [part for part in self.parts if part is not self.usual]

    @property
    def quantized(self) -> Sequence[str]:
        """The names of all quantized modules."""
        return [module for part in self.parts for module in part.modules]


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
    ordered: bool = False
    """Whether a matrix may name the group of each column, which another's codes may need."""
    inputs: Mapping[str, Any] | None = None
    """Settings of activations that a runtime quantizes."""

    @property
    def usual_bits(self) -> int:
        """The default: 4 where there are such grids."""
        return 4 if 4 in self.bits else self.bits[0]

    def has_group(self, size: int) -> bool:
        """Whether so many weights of a row may share a scale."""
        return self.groups is not None and (
            size in self.groups or (not self.groups and size >= 8 and size % 8 == 0)
        )


_GRID_FIELDS = frozenset({"bits", "grid", "method", "keep", "dtype", "on_fallback"})
_PRESET_FIELDS = frozenset({"scheme", "range", "method", "keep", "dtype", "on_fallback", "strict"})
_FLOAT_FIELDS = frozenset({"types", "method", "dtype", "range"})


def serve(name: str) -> str:
    """The command that serves a folder with vLLM."""
    return f"vllm serve {name}"


def remark_nothing(grid: CodeGrid, matrices: Sequence[Matrix]) -> Iterator[Note]:
    """No notes."""
    yield from ()


_EXPERT = re.compile(r"(?P<layer>.*\bexperts)\.\d+\.")


def kept_experts(subject: FolderFacts) -> list[str]:
    """The modules of experts none of which is quantized, such as "model.layers.0.mlp.experts".

    vLLM runs these as one module, and looks for it by that name.
    """

    def layers(modules: Sequence[str]) -> list[str]:
        matches = (_EXPERT.match(module) for module in modules)
        return list(dict.fromkeys(match["layer"] for match in matches if match))

    others = set(layers(subject.quantized))
    return [layer for layer in layers(subject.kept) if layer not in others]


def kept_patterns(subject: FolderFacts) -> list[str]:
    """GPTQModel's patterns of the modules that are not quantized, the head left out."""
    experts = kept_experts(subject)
    inside = tuple(f"{layer}." for layer in experts)
    inner = [name for name in subject.kept if name != "lm_head" and not name.startswith(inside)]
    return [
        *(rf"-:^{re.escape(layer)}(\.|$)" for layer in experts),
        *(f"-:^{re.escape(name)}$" for name in inner),
    ]


_GPTQMODEL_GROUPS = (32, 64, 128, 256)


def remark_readers(grid: CodeGrid, matrices: Sequence[Matrix]) -> Iterator[Note]:
    """What transformers 5 and GPTQModel 7.7 do not take of GPTQ and AWQ folders."""
    if grid.group_size not in _GPTQMODEL_GROUPS:
        yield Note(
            "GPTQModel runs groups of 32, 64, 128 and 256 only on a CPU", refused_by="GPTQModel"
        )
    if any(matrix.module.endswith(".gate_up_proj") for matrix in matrices):
        yield Note(
            "GPTQModel looks for gate_proj and up_proj where this model has gate_up_proj, and does "
            "not load it; vLLM does",
            "warning",
            "GPTQModel",
        )
    if any("_exps." in matrix.tensor for matrix in matrices):
        yield Note(
            "transformers 5 does not load experts from GPTQ and AWQ folders, and leaves them unset "
            "without an error; --to compressed-tensors is what it loads",
            "warning",
            "transformers",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A model-folder format.

    ``grids`` are for float activations, None where there are none; ``activations`` are the
    grids for activations that a runtime quantizes, by their name in a recipe. ``presets`` are its
    named schemes, the first of which is the default where there are no grids. ``read`` returns a
    folder's quantized weights by name, if the ``quant_method`` of its settings is the layout's
    name; SourceError where it does not understand them. ``remark`` yields notes on what runtimes do
    with a grid and its matrices.
    """

    name: str
    help: str
    grids: Grids | None = None
    activations: Mapping[str, Grids] = field(default_factory=dict)
    presets: Mapping[str, Preset] = field(default_factory=dict)
    shorthands: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Presets by the names of activations and bits, where no grids of ``activations`` are meant."""
    inputs: InputScales | None = None
    """Where scales of activations go that are found beforehand."""
    caches: Mapping[str, CacheScales] = field(default_factory=dict)
    """Scales of key-value caches, by what a recipe calls them."""
    read: Callable[[StoredTensors, Settings], Mapping[str, PackedWeight]] | None = None
    embeddings: bool = False
    """Whether the embedding and the head are quantized too."""
    stacked: bool = False
    """Whether a layer's experts are one tensor."""
    mixed: bool = False
    """Whether modules of a folder may have several grids."""
    served: tuple[int, ...] = ()
    """Bits of integers that servers run, where these are fewer than the grids have."""
    fuses: bool = True
    """Whether its runtimes run several modules as one matrix, which then has one scheme."""
    remark: Callable[[CodeGrid, Sequence[Matrix]], Iterable[Note]] = remark_nothing
    usage: Callable[[str], str] = serve
    """The command that runs the folder of a name."""
    library: str = "transformers"
    """The library that a model card names."""
    header: str = "pt"
    """The ``format`` in the headers of the safetensors files."""

    @property
    def has_codes(self) -> bool:
        """Whether weights are stored as codes."""
        return self.grids is not None or bool(self.presets)

    @property
    def takes(self) -> frozenset[str]:
        """The sections and single fields of a recipe that it takes."""
        if not self.has_codes:
            return _FLOAT_FIELDS
        if self.grids is None:
            return _PRESET_FIELDS | ({"kv_cache", "statistics"} if self.caches else set())
        found = _GRID_FIELDS | ({"activations"} if self.activations else set())
        found |= {"scheme"} if self.presets or self.mixed else set()
        return found | ({"allocation"} if self.mixed else set())


def as_stored(values: NDArray[Any], grid: CodeGrid) -> NDArray[Any]:
    """Scales or edges in the dtype that they are exact in."""
    return np.ascontiguousarray(values, DTYPES[grid.scale_dtype])
