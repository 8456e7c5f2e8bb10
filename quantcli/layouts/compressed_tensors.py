"""compressed-tensors, the format of llm-compressor, vLLM and transformers.

"pack-quantized" holds weights of 2 to 8 bits in 32-bit words, for 16-bit activations.
"int-quantized" holds a byte for each weight, and a runtime quantizes each token's activations to
int8 as they come. Names and shapes are those of compressed-tensors 0.20's compressors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from quantcli.artifacts.safetensors_container import Declared
from quantcli.formats.integer import IntegerCodes, IntegerGrid
from quantcli.layouts.base import Packing, Patch, Subject, as_stored, refuse_never
from quantcli.layouts.packing import compressed_tensors as packing
from quantcli.layouts.packing.bits import word_count
from quantcli.types import Matrix


def _scale_shape(matrix: Matrix, grid: IntegerGrid) -> tuple[int, ...]:
    return (1,) if grid.strategy == "tensor" else (matrix.rows, grid.groups(matrix.columns))


def _declare_packed(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    name, scale = matrix.module, _scale_shape(matrix, grid)
    tensors = [
        Declared(
            f"{name}.weight_packed", "I32", (matrix.rows, word_count(matrix.columns, grid.bits))
        ),
        Declared(f"{name}.weight_scale", grid.scale_dtype, scale),
        Declared(f"{name}.weight_shape", "I64", (2,)),
    ]
    if grid.symmetric:
        return tensors
    if grid.strategy == "tensor":
        zero = Declared(f"{name}.weight_zero_point", "I8", scale)
    else:
        shape = (word_count(matrix.rows, grid.bits), *scale[1:])
        zero = Declared(f"{name}.weight_zero_point", "I32", shape)
    return [*tensors, zero]


def _place_packed(
    matrix: Matrix, grid: IntegerGrid, start: int, coded: IntegerCodes
) -> Iterator[Patch]:
    name = matrix.module
    yield Patch(f"{name}.weight_packed", packing.pack_codes(coded.codes, grid.bits), start)
    if start == 0:
        yield Patch(f"{name}.weight_shape", np.array([[matrix.rows, matrix.columns]], np.int64))
    if grid.strategy != "tensor":
        yield Patch(f"{name}.weight_scale", as_stored(coded.scales, grid), start)
        if coded.zeros is not None:
            zeros = packing.pack_zeros(coded.zeros, grid.bits)
            yield Patch(f"{name}.weight_zero_point", zeros, word_count(start, grid.bits))
    elif start == 0:
        yield Patch(f"{name}.weight_scale", as_stored(coded.scales, grid))
        if coded.zeros is not None:
            yield Patch(f"{name}.weight_zero_point", (coded.zeros - grid.middle).astype(np.int8))


def _declare_bytes(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    return [
        Declared(f"{matrix.module}.weight", "I8", (matrix.rows, matrix.columns)),
        Declared(f"{matrix.module}.weight_scale", grid.scale_dtype, _scale_shape(matrix, grid)),
    ]


def _place_bytes(
    matrix: Matrix, grid: IntegerGrid, start: int, coded: IntegerCodes
) -> Iterator[Patch]:
    signed = (coded.codes ^ np.uint8(grid.middle)).view(np.int8)
    yield Patch(f"{matrix.module}.weight", signed, start)
    if grid.strategy != "tensor" or start == 0:
        yield Patch(f"{matrix.module}.weight_scale", as_stored(coded.scales, grid), start)


def _describe(form: str, activations: dict[str, Any] | None, subject: Subject) -> dict[str, Any]:
    grid = subject.grid
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": grid.strategy,
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": form,
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(subject.kept),
            "kv_cache_scheme": None,
        }
    }


def _describe_packed(subject: Subject) -> dict[str, Any]:
    return _describe("pack-quantized", None, subject)


def _describe_bytes(subject: Subject) -> dict[str, Any]:
    tokens = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    return _describe("int-quantized", tokens, subject)


PACKED = Packing(_declare_packed, _place_packed, _describe_packed, refuse_never)
BYTES = Packing(_declare_bytes, _place_bytes, _describe_bytes, refuse_never)
