"""compressed-tensors' "int-quantized" and "float-quantized": a byte for each weight.

``X.weight`` (int8 or E4M3) with ``X.weight_scale`` and perhaps ``X.weight_zero_point``, written for
runtimes that quantize activations too. "mxfp8-quantized" is E4M3 with powers of two as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.float_grid import BLOCK, FloatGrid
from quantcli.formats.integer import GridCodes
from quantcli.layouts.base import CodeGrid, Packing, Patch, as_stored
from quantcli.layouts.compressed_tensors.groups import (
    METHOD,
    StoredScheme,
    describe_config,
    float_weights,
    integer_weights,
    scale_shape,
)
from quantcli.layouts.fp8 import find_scale
from quantcli.layouts.scaled import (
    E4M3,
    INT8,
    SCALE_DTYPES,
    ScaledWeight,
    build_scaled,
    fit_scale,
)
from quantcli.layouts.stored import StoredTensors, check_group, describe, expect_shape, take_part
from quantcli.types import Declared, Matrix, TensorInfo


def _declare(matrix: Matrix, grid: CodeGrid) -> list[Declared]:
    kind, scale = INT8, grid.scale_dtype
    if isinstance(grid, FloatGrid):
        kind, scale = E4M3, "U8" if grid.scales == "E8M0" else grid.scale_dtype
    return [
        Declared(f"{matrix.module}.weight", kind, (matrix.rows, matrix.columns)),
        Declared(f"{matrix.module}.weight_scale", scale, scale_shape(matrix, grid)),
    ]


def _place(matrix: Matrix, grid: CodeGrid, start: int, coded: GridCodes) -> Iterator[Patch]:
    codes, step = coded.codes, BLOCK if grid.strategy == "block" else 1
    scales = coded.scales[::step]
    stored: NDArray[Any]
    if isinstance(grid, FloatGrid):
        is_power = grid.scales == "E8M0"
        stored = grid.scale_codes(scales) if is_power else as_stored(scales, grid)
    else:
        codes, stored = (codes ^ np.uint8(grid.middle)).view(np.int8), as_stored(scales, grid)
    yield Patch(f"{matrix.module}.weight", codes, start)
    if grid.strategy != "tensor" or start == 0:
        yield Patch(f"{matrix.module}.weight_scale", stored, start // step)


INT8_BYTES = Packing(
    _declare, _place, describe_config, form="int-quantized", weights=integer_weights
)
E4M3_BYTES = Packing(
    _declare, _place, describe_config, form="float-quantized", weights=float_weights
)
MXFP8_BYTES = Packing(
    _declare, _place, describe_config, form="mxfp8-quantized", weights=float_weights
)


def build_bytes(source: StoredTensors, codes: TensorInfo, scheme: StoredScheme) -> ScaledWeight:
    """The weight of these codes; SourceError names the first part that is wrong."""
    tensors, name = source.tensors, codes.name
    if (scheme.kind == "float") != (codes.dtype == E4M3) or scheme.bits > 8:
        raise SourceError(
            f"{codes.file}: tensor {name!r} is {codes.dtype}, but config.json makes it "
            f"{scheme.kind} of {scheme.bits} bits"
        )
    stored = find_scale(tensors, codes)
    columns = codes.shape[-1] if codes.shape else 1
    block = scheme.block
    if scheme.group:
        check_group(codes, columns, scheme.group)
        block = (1, scheme.group)
    # MXFP8's exponents are bytes.
    scale = fit_scale(codes, stored, block, (*SCALE_DTYPES, *(("U8",) if scheme.group else ())))
    zeros = f"{name}_zero_point"
    others: tuple[str, ...] = ()
    has_zeros = zeros in tensors and codes.dtype == INT8
    if has_zeros:
        expect_shape(take_part(tensors, zeros, name, (INT8,)), stored.shape, f"as {stored.name!r}")
    elif zeros in tensors:
        others = (zeros,)
    elif not scheme.symmetric:
        take_part(tensors, zeros, name, (INT8,))
    kind = None
    if codes.dtype == INT8:
        kind = describe(METHOD, scheme.bits, columns, scheme.group or columns, whole=stored)
    return build_scaled(
        tensors, codes, scale, kind=kind, zeros=zeros if has_zeros else None, others=others,
        bits=scheme.bits,
    )  # fmt: skip
