"""A made-up layout in one file: a byte for each code, and the scales of groups."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from quantcli.formats.integer import IntegerCodes, IntegerGrid
from quantcli.layouts.base import Grids, Layout, Packing, Patch, Subject, as_stored
from quantcli.layouts.settings import Settings
from quantcli.layouts.stored import (
    Floats,
    RowWeight,
    StoredTensors,
    describe,
    expect_shape,
    scale_groups,
    show,
    take_part,
)
from quantcli.types import Declared, Matrix, TensorInfo

_CODES, _SCALES = ".toy_codes", ".toy_scales"


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    scales = (matrix.rows, grid.groups(matrix.columns))
    return [
        Declared(f"{matrix.module}{_CODES}", "U8", (matrix.rows, matrix.columns)),
        Declared(f"{matrix.module}{_SCALES}", grid.scale_dtype, scales),
    ]


def _place(matrix: Matrix, grid: IntegerGrid, start: int, coded: IntegerCodes) -> Iterator[Patch]:
    yield Patch(f"{matrix.module}{_CODES}", coded.codes, start)
    yield Patch(f"{matrix.module}{_SCALES}", as_stored(coded.scales, grid), start)


def _describe(subject: Subject) -> dict[str, Any]:
    grid = subject.grid
    settings = {"quant_method": "toy", "bits": grid.bits, "group_size": grid.group_size}
    return {"quantization_config": settings}


def _refuse(matrix: Matrix, grid: IntegerGrid) -> str | None:
    return "toys are small" if matrix.rows > 4096 else None


def find_toys(source: StoredTensors, settings: Settings) -> dict[str, RowWeight]:
    """Every toy matrix; SourceError names the first part that is wrong."""
    bits, group = settings.count("bits"), settings.count("group_size")
    return {
        name.replace(_CODES, ".weight"): _build(source, info, bits, group)
        for name, info in source.tensors.items()
        if name.endswith(_CODES)
    }


def _build(source: StoredTensors, codes: TensorInfo, bits: int, group: int) -> RowWeight:
    module, (rows, columns) = codes.name.removesuffix(_CODES), codes.shape
    scales = take_part(source.tensors, f"{module}{_SCALES}", codes.name, ("F16",))
    expect_shape(scales, (rows, columns // group), f"for groups of {group} in {codes.name!r}")
    parts = (codes.name, scales.name)
    kind = describe("toy", bits, columns, group)
    info = show(f"{module}.weight", codes.shape, kind, parts, source.tensors)
    return RowWeight(info, parts, partial(_decode, parts, 1 << (bits - 1)))


def _decode(
    parts: tuple[str, str], middle: int, source: StoredTensors, start: int, stop: int
) -> Floats:
    codes, scales = (source.load(part, (start, stop)).astype(np.float32) for part in parts)
    return scale_groups(codes - np.float32(middle), scales)


def _usage(name: str) -> str:
    return f"toy run {name}"


TOY = Layout(
    name="toy",
    help="4 or 8 bits, a byte for each, for nobody",
    grids=Grids((4, 8), "middle", group=64, groups=(32, 64), scale_dtype="F16"),
    weights=Packing(_declare, _place, _describe, _refuse),
    read=find_toys,
    usage=_usage,
)
