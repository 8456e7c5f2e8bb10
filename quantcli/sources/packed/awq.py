"""AWQ checkpoints in the GEMM layout: ``X.qweight``, ``X.qzeros`` and ``X.scales``, four bits.

Matrices are stored transposed and packed along the outputs, eight in a word in an order of their
own, so rows are columns of the file. The other versions (GEMV, Marlin) lie differently and are
refused. Source: AutoAWQ's ``WQLinear_GEMM``.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from quantcli.layouts.packing import awq
from quantcli.sources.packed.settings import Settings
from quantcli.sources.packed.weight import (
    FLOATS,
    Floats,
    RowWeight,
    check_group,
    describe,
    expect_shape,
    load,
    scale_groups,
    show,
    take_part,
)
from quantcli.sources.shards import Shards
from quantcli.types import TensorInfo

_SUFFIX = ".qweight"
_PER_WORD = 32 // awq.BITS
_MIDDLE = 1 << (awq.BITS - 1)
"""The zero point of checkpoints that store none (``zero_point`` false)."""


def find_awq(shards: Shards, settings: Settings) -> dict[str, RowWeight]:
    """Every AWQ matrix under ``X.weight``; SourceError names the first part that is wrong."""
    version = str(settings.values.get("version") or settings.values.get("format") or "gemm")
    if version.lower() != "gemm":
        raise settings.refuse(f"version {version}")
    bits = settings.count("bits", settings.values.get("w_bit", awq.BITS))
    if bits != awq.BITS:
        raise settings.refuse(f"{bits} bits")
    size = settings.count("group_size", settings.values.get("q_group_size", 128), least=-1)
    has_zeros = settings.flag("zero_point", True)
    return {
        f"{name.removesuffix(_SUFFIX)}.weight": _build(shards, info, size, has_zeros)
        for name, info in shards.tensors.items()
        if name.endswith(_SUFFIX)
    }


def _build(shards: Shards, words: TensorInfo, size: int, has_zeros: bool) -> RowWeight:
    tensors, module = shards.tensors, words.name.removesuffix(_SUFFIX)
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
    kind = describe("AWQ", awq.BITS, columns, group)
    info = show(f"{module}.weight", (rows, columns), kind, parts, tensors)
    return RowWeight(info, tuple(parts), partial(_decode, module))


def _decode(module: str, shards: Shards, start: int, stop: int) -> Floats:
    """Rows ``start:stop``, from the words that hold them."""
    first = start // _PER_WORD
    span, inner = (first, -(-stop // _PER_WORD)), slice(start % _PER_WORD, None)
    codes = awq.unpack_codes(load(shards, f"{module}.qweight", columns=span))
    weights = codes[inner][: stop - start].astype(np.float32)
    scales = load(shards, f"{module}.scales", columns=(start, stop)).astype(np.float32).T
    zeros = np.full(scales.shape, _MIDDLE, np.float32)
    if f"{module}.qzeros" in shards.tensors:
        words = load(shards, f"{module}.qzeros", columns=span)
        zeros = awq.unpack_zeros(words)[inner][: stop - start].astype(np.float32)
    return scale_groups(weights, scales, zeros)
