"""MLX's modes of small floats: "mxfp4", "mxfp8" and "nvfp4".

A matrix, or a stack of them, is ``X.weight`` of 32-bit words along each row, the first code lowest,
and ``X.scales`` of bytes: powers of two (E8M0) for each 32 weights, or E4M3 for each 16. There are
no biases, and NVFP4 has no scale of the whole matrix. Source: ``mlx.core.quantize`` of MLX 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import GridCodes
from quantcli.layouts.base import FolderFacts, Packing, Patch, Preset
from quantcli.layouts.stored import (
    Floats,
    RowWeight,
    StoredTensors,
    check_group,
    expect_shape,
    show,
    take_part,
)
from quantcli.layouts.stored_codes import Ranges, StoredCodes
from quantcli.layouts.words import WORD, Codes, pack_bits, unpack_bits
from quantcli.types import Declared, Matrix, PackedType, TensorInfo

GRIDS: Mapping[str, FloatGrid] = {
    "mxfp4": FloatGrid("E2M1", "group", 32, "E8M0", mlx=True),
    "mxfp8": FloatGrid("E4M3", "group", 32, "E8M0", mlx=True),
    "nvfp4": FloatGrid("E2M1", "group", 16, "E4M3", "F32", whole=1.0, mlx=True),
}
"""By the mode's name in config.json."""


def describe_mode(grid: FloatGrid) -> dict[str, Any]:
    """What config.json says of a grid."""
    mode = next(name for name, known in GRIDS.items() if known == grid)
    return {"group_size": grid.group_size, "bits": grid.bits, "mode": mode}


def list_presets(describe: Callable[[FolderFacts], dict[str, Any]]) -> dict[str, Preset]:
    """The modes as schemes, by their names; ``describe`` is the layout's."""
    packing = Packing(_declare, _place, describe)
    texts = {
        "mxfp4": "FP4 with a power of two for each 32",
        "mxfp8": "FP8 with a power of two for each 32",
        "nvfp4": "FP4 with an FP8 scale for each 16",
    }
    return {
        name.upper(): Preset(name=name.upper(), help=text, grid=GRIDS[name], packing=packing)
        for name, text in texts.items()
    }


def _declare(matrix: Matrix, grid: FloatGrid) -> list[Declared]:
    lead = (matrix.stack,) if matrix.stack else ()
    words, groups = matrix.columns * grid.bits // WORD, grid.groups(matrix.columns)
    return [
        Declared(f"{matrix.module}.weight", "U32", (*lead, matrix.rows, words)),
        Declared(f"{matrix.module}.scales", "U8", (*lead, matrix.rows, groups)),
    ]


def _place(matrix: Matrix, grid: FloatGrid, start: int, coded: GridCodes) -> Iterator[Patch]:
    row = matrix.slot * matrix.rows + start
    yield Patch(f"{matrix.module}.weight", pack_bits(coded.codes, grid.bits), row)
    yield Patch(f"{matrix.module}.scales", grid.scale_codes(coded.scales), row)


def build_floats(source: StoredTensors, words: TensorInfo, mode: str) -> RowWeight:
    """The weight of these words; SourceError when a part is missing or does not fit."""
    grid, module = GRIDS[mode], words.name.removesuffix(".weight")
    size = grid.group_size or 1
    shape = (*words.shape[:-1], words.shape[-1] * WORD // grid.bits)
    check_group(words, shape[-1], size)
    scales = take_part(source.tensors, f"{module}.scales", words.name, ("U8",))
    expect_shape(
        scales, (*shape[:-1], shape[-1] // size), f"for groups of {size} in {words.name!r}"
    )
    parts = [words.name, scales.name]
    info = show(words.name, shape, PackedType(f"MLX {mode}"), parts, source.tensors)
    coded = StoredCodes(grid, partial(_codes, module, grid), partial(_ranges, module, grid))
    return RowWeight(info, tuple(parts), partial(_decode, module, grid), coded)


def _codes(module: str, grid: FloatGrid, source: StoredTensors, start: int, stop: int) -> Codes:
    words = source.load(f"{module}.weight", (start, stop))
    return unpack_bits(words, grid.bits, words.shape[1] * WORD // grid.bits)


def _ranges(module: str, grid: FloatGrid, source: StoredTensors, start: int, stop: int) -> Ranges:
    kind = ml_dtypes.float8_e4m3fn if grid.scales == "E4M3" else ml_dtypes.float8_e8m0fnu
    return source.load(f"{module}.scales", (start, stop)).view(kind).astype(np.float32), None


def _decode(module: str, grid: FloatGrid, source: StoredTensors, start: int, stop: int) -> Floats:
    codes = _codes(module, grid, source, start, stop)
    return grid.dequantize(GridCodes(codes, _ranges(module, grid, source, start, stop)[0]))
