"""bitsandbytes: nf4 and fp4 in blocks of consecutive weights, and int8 with a scale a row.

Four bits: ``X.weight`` holds the flattened matrix, the even weight in the high half of a byte;
``X.weight.absmax`` the scale of each block, ``X.weight.quant_map`` what the sixteen codes stand
for, and ``X.weight.quant_state.bitsandbytes__nf4`` (or ``fp4``) a JSON text with shape and block
size. Scales may be quantized once more: then they are bytes that ``nested_quant_map``,
``nested_absmax`` and an offset turn back. Eight bits: ``X.weight`` is int8 and ``X.SCB`` each
row's largest magnitude. Sources: ``QuantState`` and ``int8_vectorwise_dequant`` of bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from quantcli.errors import SourceError
from quantcli.layouts.scaled import INT8, Scale, ScaledWeight, build_scaled
from quantcli.layouts.settings import Settings, count
from quantcli.layouts.stored import (
    Floats,
    PackedWeight,
    RowWeight,
    StoredTensors,
    describe,
    expect_shape,
    look_up_pairs,
    show,
    take_part,
)
from quantcli.types import PackedType, TensorInfo

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_STATE_CAP = 1 << 16
_BLOCK_CAP = 1 << 16
_ROW_SCALE = 7.874015718698502e-3
"""1/127 as bitsandbytes rounds it."""


@dataclass(frozen=True, slots=True)
class _Blocks:
    name: str
    columns: int
    size: int
    nested_size: int
    nested_offset: float


def find_bitsandbytes(source: StoredTensors, settings: Settings) -> dict[str, PackedWeight]:
    """Every quantized matrix; SourceError names the first part that is wrong."""
    found: dict[str, PackedWeight] = {}
    for name, info in source.tensors.items():
        weight, mark, kind = name.partition(_STATE)
        if mark and weight in source.tensors:
            if kind not in _KINDS:
                raise SourceError(
                    f"{info.file}: tensor {name!r} is of the unknown kind {kind!r}; "
                    f"{' and '.join(_KINDS)} are read"
                )
            found[weight] = _build_blocks(source, source.tensors[weight], info, kind)
        elif info.dtype == INT8 and name.endswith(".weight"):
            found[name] = _build_rows(source, info)
    packed = settings.flag("load_in_4bit", False)
    for name, info in source.tensors.items():
        if packed and info.dtype == "U8" and name.endswith(".weight") and name not in found:
            raise SourceError(
                f"{info.file}: tensor {name!r} holds codes, but there is no {name}{_STATE}nf4, "
                "without which they mean nothing",
                hint="the checkpoint is incomplete",
            )
    return found


def _build_rows(source: StoredTensors, codes: TensorInfo) -> ScaledWeight:
    module = codes.name.removesuffix(".weight")
    scale = take_part(source.tensors, f"{module}.SCB", codes.name, ("F32",))
    if len(codes.shape) != 2:
        raise SourceError(
            f"{codes.file}: tensor {codes.name!r} has shape {list(codes.shape)}; int8 codes of "
            "bitsandbytes are a matrix"
        )
    rows, columns = codes.shape
    expect_shape(scale, (rows,), f"for the rows of {codes.name!r}")
    layout = f"{module}.weight_format"
    others: tuple[str, ...] = ()
    if layout in source.tensors:
        others = (layout,)
        if source.load(layout).any():
            raise SourceError(
                f"{codes.file}: tensor {layout!r} names an order of the codes other than rows"
            )
    return build_scaled(
        source.tensors, codes, Scale(scale.name, 1, rows, 1, 1, columns),
        kind=describe("bitsandbytes", 8, columns, columns), factor=_ROW_SCALE, others=others,
    )  # fmt: skip


def _build_blocks(
    source: StoredTensors, codes: TensorInfo, state: TensorInfo, kind: str
) -> RowWeight:
    tensors, name = source.tensors, codes.name
    values = _read_state(source, state)
    shape = values.get("shape")
    where = f"{state.file}: tensor {state.name!r}"
    if (
        not isinstance(shape, list)
        or not shape
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    ):
        raise SourceError(f"{where} gives the shape {shape!r}; positive whole numbers belong there")
    total = math.prod(shape)
    if codes.nbytes != -(-total // 2):
        raise SourceError(
            f"{codes.file}: tensor {name!r} has {codes.nbytes} bytes, but {total} weights of "
            f"shape {shape} fill {-(-total // 2)}"
        )
    size = count(values, "blocksize", where)
    if size > _BLOCK_CAP:
        raise SourceError(f"{where} gives blocks of {size} weights; {_BLOCK_CAP} is the most")
    blocks = -(-total // size)
    scales = take_part(tensors, f"{name}.absmax", name, ("F32", "U8"))
    why = f"for blocks of {size} weights in {name!r}"
    expect_shape(scales, (blocks,), why)
    table = take_part(tensors, f"{name}.quant_map", name, ("F32",))
    expect_shape(table, (16,), f"for the codes of {name!r}")
    parts = [name, state.name, scales.name, table.name]
    nested, offset = 0, 0.0
    if scales.dtype == "U8":
        nested = count(values, "nested_blocksize", where)
        offset = _number(values, "nested_offset", where)
        outer = take_part(tensors, f"{name}.nested_absmax", name, ("F32",))
        expect_shape(outer, (-(-blocks // nested),), why)
        levels = take_part(tensors, f"{name}.nested_quant_map", name, ("F32",))
        expect_shape(levels, (256,), f"for the scales of {name!r}")
        parts += [outer.name, levels.name]
    said = f"bitsandbytes {kind}, blocks of {size}" + (", scales in 8 bits" if nested else "")
    info = show(name, tuple(shape), PackedType(said), parts, tensors)
    matrix = _Blocks(name, shape[-1], size, nested, offset)
    return RowWeight(info, tuple(parts), partial(_decode, matrix))


def _read_state(source: StoredTensors, state: TensorInfo) -> Mapping[str, Any]:
    where = f"{state.file}: tensor {state.name!r}"
    if state.dtype != "U8" or state.nbytes > _STATE_CAP:
        raise SourceError(
            f"{where} should be a JSON text, but is {state.nbytes} bytes of {state.dtype}"
        )
    try:
        values = json.loads(source.load_bytes(state.name, 0, state.nbytes).tobytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is not a JSON text: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{where} holds a JSON {type(values).__name__} where an object belongs")
    return values


def _number(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise SourceError(f"{where}: {key} is {value!r}; a number belongs there")
    return float(value)


def _decode(matrix: _Blocks, source: StoredTensors, start: int, stop: int) -> Floats:
    """Rows ``start:stop``; blocks run on from row to row."""
    first, last = start * matrix.columns, stop * matrix.columns
    stored = source.load_bytes(matrix.name, first // 2, -(-last // 2))
    table = source.load(f"{matrix.name}.quant_map")[0]
    values = look_up_pairs(stored, table, high_first=True)[first % 2 :][: last - first]
    size = matrix.size
    scales = _scales(matrix, source, first // size, -(-last // size))
    head = min(-first % size, last - first)
    whole = (last - first - head) // size
    inside = values[head : head + whole * size].reshape(whole, size)
    inside *= scales[bool(head) : bool(head) + whole, None]
    values[:head] *= scales[0]
    values[head + whole * size :] *= scales[-1]
    return values.reshape(stop - start, matrix.columns)


def _scales(matrix: _Blocks, source: StoredTensors, low: int, high: int) -> Floats:
    scales = source.load(f"{matrix.name}.absmax", columns=(low, high))[0]
    if not matrix.nested_size:
        return np.asarray(scales, np.float32)
    table = source.load(f"{matrix.name}.nested_quant_map")[0]
    outer = source.load(f"{matrix.name}.nested_absmax")[0]
    numbers = np.arange(low, high) // matrix.nested_size
    return np.asarray(table[scales] * outer[numbers] + np.float32(matrix.nested_offset))
