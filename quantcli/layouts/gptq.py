"""GPTQ's layout, as GPTQModel, vLLM, SGLang and transformers read it, in both versions.

A matrix is ``X.qweight``, ``X.qzeros``, ``X.scales`` and ``X.g_idx``, stored transposed with dense
words along the inputs, so that rows are columns of the file; zero points are packed along the
outputs. ``checkpoint_format`` "gptq" (version 1) stores each zero point less one, so that it can
say 1 to 2^bits; "gptq_v2" stores it as it is, 0 to 2^bits - 1.

Columns are written in their order (``desc_act`` false), so ``g_idx`` counts up; where others have
ordered them by activation, ``g_idx`` names the group of every input, and groups are no runs of
them. Modules that are not quantized are excluded by GPTQModel's ``dynamic`` patterns, and for
transformers, which does not read these, by the list of those that are; of other folders the
overrides of single modules there are followed. AutoGPTQ wrote a bias of zeros beside every matrix,
which belongs to no model and does not show.

Sources: AutoGPTQ's and GPTQModel's ``pack`` for their torch linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.integer import GridCodes, IntegerGrid
from quantcli.layouts.base import (
    CodeGrid,
    FolderFacts,
    Grids,
    Layout,
    Packing,
    Patch,
    as_stored,
    kept_patterns,
    remark_readers,
)
from quantcli.layouts.patterns import fit_patterns
from quantcli.layouts.settings import Settings, count
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
from quantcli.layouts.stored_codes import StoredCodes, scale_kind, span_of
from quantcli.layouts.words import WORD, Codes, pack_bits, unpack_bits, word_count
from quantcli.types import Declared, Matrix, Note, TensorInfo

Ints = NDArray[np.int32]

BITS = (2, 3, 4, 8)
"""What the layout is defined for."""
SERVED = (4, 8)
"""What vLLM and SGLang run of it."""
STORED_LESS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` -> how much less than the zero point is stored."""
_AUTO_ROUND_V2 = ("auto_round", "auto_round:gptqmodel")
"""AutoRound's ``packing_format`` of zero points that are stored as they are."""

_SUFFIX = ".qweight"


def pack_codes(codes: Codes, bits: int) -> Ints:
    """``qweight``: int32 (in * bits / 32, out) of codes (out, in)."""
    return np.ascontiguousarray(pack_bits(codes, bits).T).view(np.int32)


def unpack_codes(qweight: Ints, bits: int) -> Codes:
    """Codes (out, in) of ``qweight`` (in * bits / 32, out)."""
    return unpack_bits(qweight.T, bits, qweight.shape[0] * WORD // bits)


def pack_zeros(zeros: NDArray[Any], bits: int, layout: str) -> Ints:
    """``qzeros``: int32 (groups, out * bits / 32) of zero points (out, groups).

    ``layout`` is a key of `STORED_LESS`; ValueError for a zero point that it cannot say.
    """
    stored = zeros.T.astype(np.int32) - STORED_LESS[layout]
    if stored.size and (stored.min() < 0 or stored.max() >> bits):
        raise ValueError(f"{layout} does not hold zero points {zeros.min()} to {zeros.max()}")
    return pack_bits(stored, bits).view(np.int32)


def unpack_zeros(qzeros: Ints, bits: int, layout: str) -> NDArray[np.int32]:
    """Zero points (out, groups) of ``qzeros`` (groups, out * bits / 32)."""
    stored = unpack_bits(qzeros, bits, qzeros.shape[1] * WORD // bits)
    return np.ascontiguousarray(stored.T.astype(np.int32) + STORED_LESS[layout])


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    name, groups = matrix.module, grid.groups(matrix.columns)
    return [
        Declared(f"{name}.qweight", "I32", (word_count(matrix.columns, grid.bits), matrix.rows)),
        Declared(f"{name}.qzeros", "I32", (groups, word_count(matrix.rows, grid.bits))),
        Declared(f"{name}.scales", grid.scale_dtype, (groups, matrix.rows)),
        Declared(f"{name}.g_idx", "I32", (matrix.columns,)),
    ]


def _place(
    layout: str, matrix: Matrix, grid: IntegerGrid, start: int, coded: GridCodes
) -> Iterator[Patch]:
    name = matrix.module
    zeros = coded.zeros
    if zeros is None:
        zeros = np.full(coded.scales.shape, grid.middle, np.int32)
    yield Patch(f"{name}.qweight", pack_codes(coded.codes, grid.bits), column=start)
    yield Patch(
        f"{name}.qzeros",
        pack_zeros(zeros, grid.bits, layout),
        column=word_count(start, grid.bits),
    )
    yield Patch(f"{name}.scales", as_stored(coded.scales.T, grid), column=start)
    if start == 0:
        size = grid.group_size or matrix.columns
        groups = np.arange(matrix.columns, dtype=np.int32) // size
        yield Patch(f"{name}.g_idx", (groups if coded.order is None else coded.order)[None])


def _describe(layout: str, subject: FolderFacts) -> dict[str, Any]:
    grid = subject.grid
    inner = [name for name in subject.kept if name != "lm_head"]
    own = {
        f"+:^{re.escape(name)}$": {
            "bits": part.grid.bits,
            "group_size": part.grid.group_size or -1,
            **({} if part.grid.symmetric == grid.symmetric else {"sym": part.grid.symmetric}),
        }
        for part in subject.others
        for name in _with_fused(part.modules)
    }
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size or -1,
        "desc_act": any(part.grid.ordered for part in subject.parts),
        "sym": grid.symmetric,
        "lm_head": False,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
    }
    if inner or own:
        settings["dynamic"] = {pattern: {} for pattern in kept_patterns(subject)} | own
    if inner:
        settings["modules_in_block_to_quantize"] = [_endings(subject.quantized, inner)]
    return {"quantization_config": settings}


_VLLM_BITS = (4, 8)
_FUSED = {
    "q_proj": "qkv_proj", "gate_proj": "gate_up_proj", "w1": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj", "in_proj_qkv": "in_proj_qkvz", "in_proj_b": "in_proj_ba",
}  # fmt: skip
"""What vLLM calls the matrix that begins with a module; it looks for patterns by that name."""
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")
"""All experts of a layer are one module there."""


def _with_fused(modules: Sequence[str]) -> list[str]:
    """The modules, and the names under which vLLM runs them with others."""
    names = dict.fromkeys(modules)
    for module in modules:
        block, _, leaf = module.rpartition(".")
        if leaf in _FUSED:
            names[f"{block}.{_FUSED[leaf]}"] = None
        if (expert := _EXPERT.match(module)) is not None:
            names[expert[1]] = None
    return list(names)


def _endings(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """The shortest of names' endings that tell the quantized modules from the kept ones."""
    others = {_last(name) for name in kept}
    return sorted({name if _last(name) in others else _last(name) for name in quantized})


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _refuse(matrix: Matrix, grid: IntegerGrid) -> str | None:
    if matrix.rows % WORD or matrix.columns % WORD:
        return f"both its sides must be multiples of {WORD}"
    return None


@dataclass(frozen=True, slots=True)
class _Matrix:
    module: str
    bits: int
    group: int
    columns: int
    version: str
    has_order: bool


def find_gptq(source: StoredTensors, settings: Settings) -> dict[str, RowWeight]:
    """Every GPTQ matrix under ``X.weight``; SourceError names the first part that is wrong."""
    values = settings.values
    assumed = "gptq_v2" if values.get("packing_format") in _AUTO_ROUND_V2 else "gptq"
    version = str(values.get("checkpoint_format") or values.get("format") or assumed)
    if values.get("is_marlin_format"):
        version = "marlin"
    if version not in STORED_LESS:
        raise settings.refuse(version)
    modules = [name.removesuffix(_SUFFIX) for name in source.tensors if name.endswith(_SUFFIX)]
    overrides = _override(modules, settings) | _override_as_autoround(source, modules, settings)
    found = {}
    for module in modules:
        info = source.tensors[module + _SUFFIX]
        own = replace(settings, values=overrides.get(module, settings.values))
        found[f"{module}.weight"] = _build(source, info, module, own, version)
    return found


def _build(
    source: StoredTensors, words: TensorInfo, module: str, settings: Settings, version: str
) -> RowWeight:
    tensors = source.tensors
    values = settings.values
    bits = count(values, "bits", settings.where)
    if bits not in BITS:
        raise SourceError(
            f"{settings.where}: {module} has {bits} bits; {', '.join(map(str, BITS))} are read"
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
    if bias in tensors and _is_nothing(source, bias):
        parts.append(bias)
    matrix = _Matrix(module, bits, group, columns, version, _is_ordered(source, order, group))
    kind = describe("GPTQ", bits, columns, group)
    info = show(f"{module}.weight", (rows, columns), kind, parts, tensors)
    grid = IntegerGrid(
        bits, "integer", *span_of(columns, group), scale_kind(scales.dtype),
        ordered=matrix.has_order,
    )  # fmt: skip
    coded = StoredCodes(
        grid, partial(_codes, matrix), partial(_ranges, matrix),
        order=partial(_order, order) if matrix.has_order else None,
    )  # fmt: skip
    return RowWeight(info, tuple(parts), partial(_decode, matrix), coded)


def _override(modules: Sequence[str], settings: Settings) -> dict[str, Mapping[str, Any]]:
    """The settings of modules that have their own: GPTQModel's ``dynamic`` maps patterns to them.

    The first that fits a module holds.
    """
    dynamic = settings.values.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise SourceError(f"{settings.where}: dynamic is not an object")
    expressions = {
        pattern: pattern.removeprefix("+:")
        for pattern, changes in dynamic.items()
        if not pattern.startswith("-:") and isinstance(changes, Mapping)
    }
    fitted = fit_patterns(expressions.values(), modules, f"{settings.where}: dynamic")
    found: dict[str, Mapping[str, Any]] = {}
    for pattern, expression in expressions.items():
        for module in fitted[expression] - found.keys():
            found[module] = {**settings.values, **dynamic[pattern]}
    return found


def _override_as_autoround(
    source: StoredTensors, modules: Sequence[str], settings: Settings
) -> dict[str, Mapping[str, Any]]:
    """The same of AutoRound's ``extra_config``: by a module's name, or else by an expression.

    An expression fits anywhere in a name; the name of a module, quantized or not, is none.
    """
    extra = settings.values.get("extra_config") or {}
    where = f"{settings.where}: extra_config"
    if not isinstance(extra, Mapping):
        raise SourceError(f"{where} is not an object")
    changes = {key: value for key, value in extra.items() if isinstance(value, Mapping)}
    named = changes.keys() & set(modules)
    found: dict[str, Mapping[str, Any]] = {
        module: {**settings.values, **changes[module]} for module in named
    }
    expressions = {
        f".*(?:{key})": key
        for key in changes
        if key not in named and f"{key}.weight" not in source.tensors
    }
    fitted = fit_patterns(expressions, modules, where)
    for expression, key in expressions.items():
        for module in fitted[expression] - found.keys():
            found[module] = {**settings.values, **changes[key]}
    return found


def _is_ordered(source: StoredTensors, name: str, group: int) -> bool:
    """Whether the groups are other than runs of inputs; SourceError when one does not exist."""
    if name not in source.tensors or source.is_remote(name):
        # Of a remote file nothing but headers is looked at.
        return False
    groups = source.load(name)[0]
    runs = np.arange(len(groups)) // group
    if len(groups) and not 0 <= groups.min() <= groups.max() <= runs[-1]:
        raise SourceError(
            f"{source.tensors[name].file}: tensor {name!r} names groups {groups.min()} to "
            f"{groups.max()}, but there are {runs[-1] + 1}"
        )
    return not np.array_equal(groups, runs)


def _is_nothing(source: StoredTensors, bias: str) -> bool:
    """Whether a bias is all zeros, as far as that can be told without a request."""
    if source.is_remote(bias) or source.tensors[bias].dtype not in FLOATS:
        return False
    return not source.load(bias).any()


def _decode(matrix: _Matrix, source: StoredTensors, start: int, stop: int) -> Floats:
    """Rows ``start:stop``, which are columns of every stored tensor."""
    scales, stored = _ranges(matrix, source, start, stop)
    zeros = stored.astype(np.float32)
    weights = _codes(matrix, source, start, stop).astype(np.float32)
    if not matrix.has_order:
        return scale_groups(weights, scales, zeros)
    order = source.load(f"{matrix.module}.g_idx")[0]
    weights -= zeros[:, order]
    weights *= scales[:, order]
    return weights


def _codes(matrix: _Matrix, source: StoredTensors, start: int, stop: int) -> Codes:
    words = source.load(f"{matrix.module}.qweight", columns=(start, stop))
    return unpack_codes(words, matrix.bits)


def _ranges(
    matrix: _Matrix, source: StoredTensors, start: int, stop: int
) -> tuple[Floats, NDArray[np.int32]]:
    scales = source.load(f"{matrix.module}.scales", columns=(start, stop)).astype(np.float32).T
    return scales, _zeros(matrix, source, start, stop)


def _order(name: str, source: StoredTensors) -> NDArray[np.int32]:
    return np.asarray(source.load(name)[0], np.int32)


def _zeros(matrix: _Matrix, source: StoredTensors, start: int, stop: int) -> NDArray[np.int32]:
    """Zero points (rows, groups); words are read from a row whose zero point begins one."""
    bits = matrix.bits
    first = start - start % WORD
    width = source.tensors[f"{matrix.module}.qzeros"].shape[1]
    last = min(width, -(-stop // WORD) * bits)
    words = source.load(f"{matrix.module}.qzeros", columns=(first * bits // 32, last))
    found = _unpack_zeros(words, bits, matrix.version)
    return found[start - first : stop - first]


def _unpack_zeros(words: NDArray[np.int32], bits: int, version: str) -> NDArray[np.int32]:
    if not STORED_LESS[version]:
        return unpack_zeros(words, bits, version)
    if 32 % bits:
        return unpack_zeros(words, bits, version) & ((1 << bits) - 1)
    # GPTQModel takes the one from the whole word, borrows and all, where a zero point is 0.
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return unpack_zeros((words.view(np.uint32) + ones).view(np.int32), bits, "gptq_v2")


def _grids(version: str, lowest_zero: int) -> Grids:
    packing = Packing(_declare, partial(_place, version), partial(_describe, version), _refuse)
    return Grids(
        BITS,
        packing,
        "middle",
        "integer",
        strategies=("channel",),
        scale_dtype="F16",
        lowest_zero=lowest_zero,
        ordered=True,
    )


def _remark_zeros(grid: CodeGrid, matrices: Sequence[Matrix]) -> Iterator[Note]:
    if not grid.symmetric:
        yield Note(
            "GPTQModel takes zero points of its own from --to gptq-v2 only, and computes something "
            "else of these",
            "warning",
            "GPTQModel",
        )
    yield from _remark(grid, matrices)


def _remark(grid: CodeGrid, matrices: Sequence[Matrix]) -> Iterator[Note]:
    if grid.bits not in _VLLM_BITS or not grid.symmetric:
        yield Note(
            "vLLM takes symmetric GPTQ of 4 and 8 bits only; it runs others from --to "
            "compressed-tensors",
            refused_by="vLLM",
        )
    yield from remark_readers(grid, matrices)


GPTQ = Layout(
    name="gptq",
    help="2, 3, 4 or 8 bits as GPTQModel stores them, for vLLM, SGLang and transformers",
    grids=_grids("gptq", 1),
    read=find_gptq,
    mixed=True,
    served=SERVED,
    remark=_remark_zeros,
)
GPTQ_V2 = Layout(
    name="gptq-v2",
    help="as gptq, with zero points stored as they are",
    grids=_grids("gptq_v2", 0),
    mixed=True,
    served=SERVED,
    remark=_remark,
)
