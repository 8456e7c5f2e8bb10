"""AWQ's GEMM layout, as AutoAWQ wrote it and vLLM, SGLang and transformers read it: 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantcli.artifacts.safetensors_container import Declared
from quantcli.formats.integer import IntegerCodes, IntegerGrid
from quantcli.layouts.base import Packing, Patch, Subject, as_stored
from quantcli.layouts.packing import awq as packing
from quantcli.types import Matrix

_WORD = 8
"""Outputs in a word."""


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    name, groups = matrix.module, grid.groups(matrix.columns)
    return [
        Declared(f"{name}.qweight", "I32", (matrix.columns, matrix.rows // _WORD)),
        Declared(f"{name}.qzeros", "I32", (groups, matrix.rows // _WORD)),
        Declared(f"{name}.scales", grid.scale_dtype, (groups, matrix.rows)),
    ]


def _place(matrix: Matrix, grid: IntegerGrid, start: int, coded: IntegerCodes) -> Iterator[Patch]:
    if coded.zeros is None:
        raise ValueError("AWQ's layout has zero points")
    name = matrix.module
    yield Patch(f"{name}.qweight", packing.pack_codes(coded.codes), column=start // _WORD)
    yield Patch(f"{name}.qzeros", packing.pack_zeros(coded.zeros), column=start // _WORD)
    yield Patch(f"{name}.scales", as_stored(coded.scales.T, grid), column=start)


def _describe(subject: Subject) -> dict[str, Any]:
    return {
        "quantization_config": {
            "quant_method": "awq",
            "bits": subject.grid.bits,
            "group_size": subject.grid.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(subject.kept),
        }
    }


def _refuse(matrix: Matrix, grid: IntegerGrid) -> str | None:
    return f"its outputs must be a multiple of {_WORD}" if matrix.rows % _WORD else None


GEMM = Packing(_declare, _place, _describe, _refuse)
