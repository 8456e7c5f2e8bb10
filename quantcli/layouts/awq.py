"""AWQ's GEMM layout, as AutoAWQ wrote it and vLLM, SGLang and transformers read it: 4 bits.

A matrix is ``X.qweight``, ``X.qzeros`` and ``X.scales``, stored transposed, so that rows are
columns of the file. Eight outputs are interleaved in a word: nibble i holds output ``ORDER[i]`` of
its eight. The other versions (GEMV, Marlin) lie differently and are refused. Source: AutoAWQ's
``WQLinear_GEMM``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.integer import GridCodes, IntegerGrid, Zero
from quantcli.layouts.base import (
    FolderFacts,
    Grids,
    Layout,
    Packing,
    Patch,
    as_stored,
    kept_experts,
    kept_patterns,
    remark_readers,
)
from quantcli.layouts.settings import Settings
from quantcli.layouts.stored import (
    FLOATS,
    Floats,
    RowWeight,
    StoredTensors,
    check_group,
    describe,
    expect_shape,
    scale_groups,
    show,
    take_part,
)
from quantcli.layouts.stored_codes import Ranges, StoredCodes, scale_kind, span_of
from quantcli.layouts.words import WORD, Codes, pack_bits, unpack_bits
from quantcli.types import Declared, Matrix, TensorInfo

Ints = NDArray[np.int32]

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = WORD // BITS
_SUFFIX = ".qweight"
_MIDDLE = 1 << (BITS - 1)
"""The zero point of checkpoints that store none (``zero_point`` false)."""


def pack_codes(codes: NDArray[Any]) -> Ints:
    """``qweight``: int32 (in, out / 8) of codes (out, in); zero points are packed alike."""
    across = np.ascontiguousarray(codes.T)
    words = across.reshape(across.shape[0], -1, _PER_WORD)[..., list(ORDER)]
    return pack_bits(words.reshape(across.shape), BITS).view(np.int32)


def unpack_codes(qweight: Ints) -> Codes:
    """Codes (out, in) of ``qweight`` (in, out / 8)."""
    words = unpack_bits(qweight, BITS, qweight.shape[1] * _PER_WORD)
    across = np.empty_like(words)
    parts = words.reshape(words.shape[0], -1, _PER_WORD)
    across.reshape(parts.shape)[..., list(ORDER)] = parts
    return np.ascontiguousarray(across.T)


pack_zeros = pack_codes
"""``qzeros``: int32 (groups, out / 8) of zero points (out, groups)."""
unpack_zeros = unpack_codes


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    name, groups = matrix.module, grid.groups(matrix.columns)
    return [
        Declared(f"{name}.qweight", "I32", (matrix.columns, matrix.rows // _PER_WORD)),
        Declared(f"{name}.qzeros", "I32", (groups, matrix.rows // _PER_WORD)),
        Declared(f"{name}.scales", grid.scale_dtype, (groups, matrix.rows)),
    ]


def _place(matrix: Matrix, grid: IntegerGrid, start: int, coded: GridCodes) -> Iterator[Patch]:
    if coded.zeros is None:
        raise ValueError("AWQ's layout has zero points")
    name = matrix.module
    yield Patch(f"{name}.qweight", pack_codes(coded.codes), column=start // _PER_WORD)
    yield Patch(f"{name}.qzeros", pack_zeros(coded.zeros), column=start // _PER_WORD)
    yield Patch(f"{name}.scales", as_stored(coded.scales.T, grid), column=start)


def _describe(subject: FolderFacts) -> dict[str, Any]:
    settings = {
        "quant_method": "awq",
        "bits": subject.grid.bits,
        "group_size": subject.grid.group_size or -1,
        "zero_point": True,
        # AutoRound goes by this, and takes what does not say it for symmetric.
        "sym": False,
        "version": "gemm",
        "modules_to_not_convert": [*subject.kept, *kept_experts(subject)],
    }
    patterns = kept_patterns(subject)
    if patterns:
        # GPTQModel passes over the list, and reads this.
        settings["dynamic"] = {pattern: {} for pattern in patterns}
    return {"quantization_config": settings}


def _refuse(matrix: Matrix, grid: IntegerGrid) -> str | None:
    return f"its outputs must be a multiple of {_PER_WORD}" if matrix.rows % _PER_WORD else None


def find_awq(source: StoredTensors, settings: Settings) -> dict[str, RowWeight]:
    """Every AWQ matrix under ``X.weight``; SourceError names the first part that is wrong."""
    version = str(settings.values.get("version") or settings.values.get("format") or "gemm")
    if version.lower() != "gemm":
        raise settings.refuse(f"version {version}")
    bits = settings.count("bits", settings.values.get("w_bit", BITS))
    if bits != BITS:
        raise settings.refuse(f"{bits} bits")
    size = settings.count("group_size", settings.values.get("q_group_size", 128), least=-1)
    has_zeros = settings.flag("zero_point", True)
    return {
        f"{name.removesuffix(_SUFFIX)}.weight": _build(source, info, size, has_zeros)
        for name, info in source.tensors.items()
        if name.endswith(_SUFFIX)
    }


def _build(source: StoredTensors, words: TensorInfo, size: int, has_zeros: bool) -> RowWeight:
    tensors, module = source.tensors, words.name.removesuffix(_SUFFIX)
    take_part(tensors, words.name, words.name, ("I32",))
    columns, packed = (*words.shape, 0, 0)[:2]
    expect_shape(words, (columns, packed), "of inputs and words")
    rows = packed * _PER_WORD
    group = columns if size == -1 else size
    check_group(words, columns, group)
    groups = columns // group
    where = f"for groups of {group} in {words.name!r}"
    scales = take_part(tensors, f"{module}.scales", words.name, FLOATS)
    expect_shape(scales, (groups, rows), where)
    parts = [words.name, scales.name]
    stored = f"{module}.qzeros"
    if has_zeros or stored in tensors:
        expect_shape(take_part(tensors, stored, words.name, ("I32",)), (groups, packed), where)
        parts.append(stored)
    kind = describe("AWQ", BITS, columns, group)
    info = show(f"{module}.weight", (rows, columns), kind, parts, tensors)
    zero: Zero = "integer" if len(parts) > 2 else "middle"
    grid = IntegerGrid(BITS, zero, *span_of(columns, group), scale_kind(scales.dtype))
    coded = StoredCodes(grid, partial(_codes, module), partial(_ranges, module))
    return RowWeight(info, tuple(parts), partial(_decode, module), coded)


def _decode(module: str, source: StoredTensors, start: int, stop: int) -> Floats:
    """Rows ``start:stop``, from the words that hold them."""
    weights = _codes(module, source, start, stop).astype(np.float32)
    scales, stored = _ranges(module, source, start, stop)
    zeros = np.full(scales.shape, _MIDDLE, np.float32)
    if stored is not None:
        zeros = stored.astype(np.float32)
    return scale_groups(weights, scales, zeros)


def _codes(module: str, source: StoredTensors, start: int, stop: int) -> Codes:
    return _nibbles(f"{module}.qweight", source, start, stop)


def _ranges(module: str, source: StoredTensors, start: int, stop: int) -> Ranges:
    scales = source.load(f"{module}.scales", columns=(start, stop)).astype(np.float32).T
    if f"{module}.qzeros" not in source.tensors:
        return scales, None
    return scales, _nibbles(f"{module}.qzeros", source, start, stop).astype(np.int32)


def _nibbles(name: str, source: StoredTensors, start: int, stop: int) -> Codes:
    first = start // _PER_WORD
    words = source.load(name, columns=(first, -(-stop // _PER_WORD)))
    return unpack_codes(words)[start % _PER_WORD :][: stop - start]


AWQ = Layout(
    name="awq",
    help="4 bits in AutoAWQ's GEMM order, for vLLM, SGLang and transformers",
    grids=Grids(
        (BITS,),
        Packing(_declare, _place, _describe, _refuse),
        asymmetric="integer",
        strategies=("channel",),
        scale_dtype="F16",
    ),
    read=find_awq,
    remark=remark_readers,
)
