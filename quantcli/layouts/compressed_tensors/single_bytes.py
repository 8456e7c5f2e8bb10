"""compressed-tensors' "int-quantized" and "float-quantized": a byte for each weight.

``X.weight`` (int8 or E4M3) with ``X.weight_scale`` and perhaps ``X.weight_zero_point``. int8 is
written for runtimes that quantize each token's activations to int8 as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from quantcli.errors import SourceError
from quantcli.formats.integer import IntegerCodes, IntegerGrid
from quantcli.layouts.base import FolderFacts, Packing, Patch, as_stored
from quantcli.layouts.compressed_tensors.groups import (
    METHOD,
    StoredScheme,
    describe_config,
    integer_scheme,
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


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    return [
        Declared(f"{matrix.module}.weight", "I8", (matrix.rows, matrix.columns)),
        Declared(f"{matrix.module}.weight_scale", grid.scale_dtype, scale_shape(matrix, grid)),
    ]


def _place(matrix: Matrix, grid: IntegerGrid, start: int, coded: IntegerCodes) -> Iterator[Patch]:
    signed = (coded.codes ^ np.uint8(grid.middle)).view(np.int8)
    yield Patch(f"{matrix.module}.weight", signed, start)
    if grid.strategy != "tensor" or start == 0:
        yield Patch(f"{matrix.module}.weight_scale", as_stored(coded.scales, grid), start)


def _describe(subject: FolderFacts) -> dict[str, Any]:
    tokens = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    return describe_config(subject, "int-quantized", integer_scheme(subject.grid, tokens))


INT8_TOKENS = Packing(_declare, _place, _describe)


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
        tensors, codes, scale, kind=kind, zeros=zeros if has_zeros else None, others=others
    )
