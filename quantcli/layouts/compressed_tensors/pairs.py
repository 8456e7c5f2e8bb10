"""compressed-tensors' "nvfp4-pack-quantized" and "mxfp4-pack-quantized": two E2M1 codes a byte.

A matrix is ``X.weight_packed`` (the even weight in the low half), ``X.weight_scale`` (E4M3 for each
16 weights, or a power of two as a byte for each 32) and, of NVFP4, ``X.weight_global_scale``, by
which the others are divided. GGUF's MXFP4 blocks hold the same codes and scales; only the order of
the nibbles differs: weights j and j+16 share a byte there. Sources: the OCP specification,
``NVFP4PackedCompressor`` and ``MXFP4PackedCompressor`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import GridCodes
from quantcli.layouts.base import Packing, Patch
from quantcli.layouts.compressed_tensors.groups import describe_config, float_weights
from quantcli.layouts.scaled import E4M3
from quantcli.types import Declared, Matrix

MX_GROUP = 32
MXFP4_GRID = FloatGrid("E2M1", "group", MX_GROUP, "E8M0")


def _declare(matrix: Matrix, grid: FloatGrid) -> list[Declared]:
    name, rows, columns = matrix.module, matrix.rows, matrix.columns
    scale = E4M3 if grid.scales == "E4M3" else "U8"
    tensors = [
        Declared(f"{name}.weight_packed", "U8", (rows, columns // 2)),
        Declared(f"{name}.weight_scale", scale, (rows, grid.groups(columns))),
    ]
    if grid.scales == "E4M3":
        tensors.append(Declared(f"{name}.weight_global_scale", "F32", (1,)))
    return tensors


def _place(matrix: Matrix, grid: FloatGrid, start: int, coded: GridCodes) -> Iterator[Patch]:
    name, codes = matrix.module, coded.codes
    yield Patch(f"{name}.weight_packed", codes[:, 0::2] | codes[:, 1::2] << np.uint8(4), start)
    bound = grid if coded.whole is None else grid.with_whole(coded.whole)
    yield Patch(f"{name}.weight_scale", bound.scale_codes(coded.scales), start)
    if coded.whole is not None and start == 0:
        yield Patch(f"{name}.weight_global_scale", np.array([[coded.whole]], np.float32))


def _refuse(matrix: Matrix, grid: FloatGrid) -> str | None:
    size = grid.group_size or 1
    return f"its columns must be a multiple of {size}" if matrix.columns % size else None


NVFP4_PAIRS = Packing(
    _declare, _place, describe_config, _refuse, "nvfp4-pack-quantized", float_weights
)
MXFP4_PAIRS = Packing(
    _declare, _place, describe_config, _refuse, "mxfp4-pack-quantized", float_weights
)
