"""GPTQ checkpoints: ``X.qweight``, ``X.qzeros``, ``X.scales`` and the optional ``X.g_idx``.

Matrices are stored transposed and packed along the inputs, so rows are columns of the file.
``g_idx`` names the group of every input; after an ordering by activation (``desc_act``) groups
are no runs of inputs. ``checkpoint_format`` "gptq" stores zero points less one, "gptq_v2" as they
are. Overrides of single modules (``dynamic``) are followed. AutoGPTQ wrote a bias of zeros beside
every matrix, which belongs to no model and does not show. Source: GPTQModel's torch layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.layouts.packing import gptq
from quantcli.sources.packed.settings import Settings, count
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
_ALIGNED = 32
"""Outputs whose zero points fill whole words, whatever the bits."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    module: str
    bits: int
    group: int
    columns: int
    version: str
    has_order: bool


def find_gptq(shards: Shards, settings: Settings) -> dict[str, RowWeight]:
    """Every GPTQ matrix under ``X.weight``; SourceError names the first part that is wrong."""
    values = settings.values
    version = str(values.get("checkpoint_format") or values.get("format") or "gptq")
    if values.get("is_marlin_format"):
        version = "marlin"
    if version not in gptq.STORED_LESS:
        raise settings.refuse(version)
    found = {}
    for name, info in shards.tensors.items():
        if not name.endswith(_SUFFIX):
            continue
        module = name.removesuffix(_SUFFIX)
        found[f"{module}.weight"] = _build(shards, info, module, settings, version)
    return found


def _build(
    shards: Shards, words: TensorInfo, module: str, settings: Settings, version: str
) -> RowWeight:
    tensors = shards.tensors
    values = _override(module, settings)
    bits = count(values, "bits", settings.where)
    if bits not in gptq.BITS:
        raise SourceError(
            f"{settings.where}: {module} has {bits} bits; {', '.join(map(str, gptq.BITS))} are read"
        )
    take_part(tensors, words.name, words.name, ("I32",))
    if len(words.shape) != 2 or words.shape[0] * 32 % bits or words.shape[1] * bits % 32:
        raise SourceError(
            f"{words.file}: tensor {words.name!r} has shape {list(words.shape)}, which is no "
            f"matrix of {bits}-bit codes"
        )
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    size = count(values, "group_size", settings.where, -1, least=-1)
    group = columns if size == -1 else size
    check_group(words, columns, group)
    groups = columns // group
    where = f"for groups of {group} in {words.name!r} of {bits} bits"
    zeros = take_part(tensors, f"{module}.qzeros", words.name, ("I32",))
    expect_shape(zeros, (groups, rows * bits // 32), where)
    scales = take_part(tensors, f"{module}.scales", words.name, FLOATS)
    expect_shape(scales, (groups, rows), where)
    parts = [words.name, zeros.name, scales.name]
    order = f"{module}.g_idx"
    if order in tensors:
        expect_shape(take_part(tensors, order, words.name, ("I32",)), (columns,), where)
        parts.append(order)
    bias = f"{module}.bias"
    if bias in tensors and _is_nothing(shards, bias):
        parts.append(bias)
    matrix = _Matrix(module, bits, group, columns, version, _is_ordered(shards, order, group))
    kind = describe("GPTQ", bits, columns, group)
    info = show(f"{module}.weight", (rows, columns), kind, parts, tensors)
    return RowWeight(info, tuple(parts), partial(_decode, matrix))


def _override(module: str, settings: Settings) -> Mapping[str, Any]:
    """The settings of one module: GPTQModel's ``dynamic`` maps patterns to what differs."""
    dynamic = settings.values.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise SourceError(f"{settings.where}: dynamic is not an object")
    for pattern, changes in dynamic.items():
        try:
            fits = re.match(pattern.removeprefix("+:"), module) is not None
        except re.error as error:
            raise SourceError(
                f"{settings.where}: dynamic has the pattern {pattern!r}: {error}"
            ) from error
        if fits and not pattern.startswith("-:") and isinstance(changes, Mapping):
            return {**settings.values, **changes}
    return settings.values


def _is_ordered(shards: Shards, name: str, group: int) -> bool:
    """Whether the groups are other than runs of inputs; SourceError when one does not exist."""
    if name not in shards.tensors or shards.places[name].file.is_remote:
        # Of a remote file nothing but headers is looked at.
        return False
    groups = load(shards, name)[0]
    runs = np.arange(len(groups)) // group
    if len(groups) and not 0 <= groups.min() <= groups.max() <= runs[-1]:
        raise SourceError(
            f"{shards.tensors[name].file}: tensor {name!r} names groups {groups.min()} to "
            f"{groups.max()}, but there are {runs[-1] + 1}"
        )
    return not np.array_equal(groups, runs)


def _is_nothing(shards: Shards, bias: str) -> bool:
    """Whether a bias is all zeros, as far as that can be told without a request."""
    if shards.places[bias].file.is_remote or shards.tensors[bias].dtype not in FLOATS:
        return False
    return not load(shards, bias).any()


def _decode(matrix: _Matrix, shards: Shards, start: int, stop: int) -> Floats:
    """Rows ``start:stop``, which are columns of every stored tensor."""
    module = matrix.module
    words = load(shards, f"{module}.qweight", columns=(start, stop))
    codes = gptq.unpack_codes(words, matrix.bits)
    scales = load(shards, f"{module}.scales", columns=(start, stop)).astype(np.float32).T
    zeros = _zeros(matrix, shards, start, stop)
    weights = codes.astype(np.float32)
    if not matrix.has_order:
        return scale_groups(weights, scales, zeros)
    order = load(shards, f"{module}.g_idx")[0]
    weights -= zeros[:, order]
    weights *= scales[:, order]
    return weights


def _zeros(matrix: _Matrix, shards: Shards, start: int, stop: int) -> Floats:
    """Zero points (rows, groups); words are read from a row whose zero point begins one."""
    bits = matrix.bits
    first = start - start % _ALIGNED
    width = shards.tensors[f"{matrix.module}.qzeros"].shape[1]
    last = min(width, -(-stop // _ALIGNED) * bits)
    words = load(shards, f"{matrix.module}.qzeros", columns=(first * bits // 32, last))
    found = _unpack_zeros(words, bits, matrix.version)
    return found[start - first : stop - first].astype(np.float32)


def _unpack_zeros(words: NDArray[np.int32], bits: int, version: str) -> NDArray[np.int32]:
    if not gptq.STORED_LESS[version]:
        return gptq.unpack_zeros(words, bits, version)
    if 32 % bits:
        return gptq.unpack_zeros(words, bits, version) & ((1 << bits) - 1)
    # GPTQModel takes the one from the whole word, borrows and all, where a zero point is 0.
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return gptq.unpack_zeros((words.view(np.uint32) + ones).view(np.int32), bits, "gptq_v2")
