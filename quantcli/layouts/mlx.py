"""MLX's folders, as ``mlx_lm`` writes and reads them; embeddings and the head are quantized too.

In the affine mode a matrix, or a stack of them, is ``X.weight`` of dense 32-bit words along each
row, ``X.scales`` and ``X.biases``; a weight is ``scale * code + bias``. config.json gives bits and
group size under ``quantization``, for single modules under their names. mlx_lm sees by its scales
whether a module is quantized, so nothing lists those that are not. The experts of a layer are one
tensor for each projection. The other modes are in `mlx_floats`.

Source: ``mlx.core.quantize``; its three bytes for eight 3-bit or four 6-bit codes, and five for
eight 5-bit codes, are the same stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import GridCodes, IntegerGrid
from quantcli.layouts.base import CodeGrid, FolderFacts, Grids, Layout, Packing, Patch, as_stored
from quantcli.layouts.mlx_experts import split_experts
from quantcli.layouts.mlx_floats import GRIDS as MODES
from quantcli.layouts.mlx_floats import build_floats, describe_mode, list_presets
from quantcli.layouts.settings import MLX as NAME
from quantcli.layouts.settings import Settings, count
from quantcli.layouts.stored import (
    FLOATS,
    Floats,
    RowWeight,
    StoredTensors,
    check_group,
    describe,
    expect_shape,
    show,
    take_part,
)
from quantcli.layouts.stored_codes import StoredCodes, scale_kind, span_of
from quantcli.layouts.words import WORD, Codes, Words, pack_bits, unpack_bits, word_count
from quantcli.types import Declared, Matrix, TensorInfo

BITS = (2, 3, 4, 5, 6, 8)
_USUAL_GROUP = 64
GROUPS = (32, 64, 128)
_SUFFIX = ".weight"


def pack_codes(codes: Codes, bits: int) -> Words:
    """``weight``: uint32 (..., out, in * bits / 32) of codes (..., out, in)."""
    return pack_bits(codes, bits)


def unpack_codes(words: NDArray[np.uint32], bits: int) -> Codes:
    """Codes (..., out, in) of ``weight`` (..., out, in * bits / 32)."""
    return unpack_bits(words, bits, words.shape[-1] * WORD // bits)


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    name, groups = matrix.module, grid.groups(matrix.columns)
    lead = (matrix.stack,) if matrix.stack else ()
    words = word_count(matrix.columns, grid.bits)
    return [
        Declared(f"{name}.weight", "U32", (*lead, matrix.rows, words)),
        Declared(f"{name}.scales", grid.scale_dtype, (*lead, matrix.rows, groups)),
        Declared(f"{name}.biases", grid.scale_dtype, (*lead, matrix.rows, groups)),
    ]


def _place(matrix: Matrix, grid: IntegerGrid, start: int, coded: GridCodes) -> Iterator[Patch]:
    if coded.zeros is None:
        raise ValueError("MLX's layout has biases")
    name, row = matrix.module, matrix.slot * matrix.rows + start
    yield Patch(f"{name}.weight", pack_codes(coded.codes, grid.bits), row)
    yield Patch(f"{name}.scales", as_stored(coded.scales, grid), row)
    yield Patch(f"{name}.biases", as_stored(coded.zeros, grid), row)


def _describe(subject: FolderFacts) -> dict[str, Any]:
    settings = _describe_grid(subject.usual.grid)
    for part in subject.others:
        settings |= {module: _describe_grid(part.grid) for module in part.modules}
    stored_head = "lm_head" in (*subject.quantized, *subject.kept)
    return {
        **_older_keys(subject.config),
        # mlx_lm takes no output matrix in a model that ties it to the embeddings.
        **({"tie_word_embeddings": False} if stored_head else {}),
        "quantization": settings,
        "quantization_config": settings,
    }


def _describe_grid(grid: CodeGrid) -> dict[str, Any]:
    if isinstance(grid, FloatGrid):
        return describe_mode(grid)
    return {"group_size": grid.group_size, "bits": grid.bits, "mode": "affine"}


def _older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that transformers 5 writes otherwise, and that mlx_lm reads or assumes a default for."""
    keys: dict[str, Any] = {}
    rope = _mapping(config.get("rope_parameters"))
    if "full_attention" in rope:
        local = _mapping(rope.get("sliding_attention"))
        if "rope_theta" in local:
            keys["rope_local_base_freq"] = local["rope_theta"]
        rope = _mapping(rope["full_attention"])
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            keys[key] = rope[key]
    kind = rope.get("rope_type", "default")
    if kind != "default":
        scaling = {k: value for k, value in rope.items() if k not in keys}
        keys["rope_scaling"] = scaling | {"type": kind}
    if "num_local_experts" in config:
        keys["num_experts"] = config["num_local_experts"]
    return {key: value for key, value in keys.items() if key not in config}


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value, or nothing where a family without a table has something else of that name."""
    return value if isinstance(value, Mapping) else {}


def find_mlx(source: StoredTensors, settings: Settings) -> dict[str, RowWeight]:
    """Every packed matrix; SourceError names the first part that is wrong."""
    packed = {
        name: _build(source, info, settings)
        for name, info in source.tensors.items()
        if info.dtype == "U32" and name.endswith(_SUFFIX)
    }
    return dict(split_experts(source, packed))


def _build(source: StoredTensors, words: TensorInfo, settings: Settings) -> RowWeight:
    tensors, module = source.tensors, words.name.removesuffix(_SUFFIX)
    own = settings.values.get(module)
    values = {**settings.values, **own} if isinstance(own, Mapping) else settings.values
    if own is False:
        raise SourceError(
            f"{words.file}: tensor {words.name!r} is packed, but {settings.where} says it is not"
        )
    mode = values.get("mode", "affine")
    if isinstance(mode, str) and mode in MODES:
        return build_floats(source, words, mode)
    if mode != "affine":
        raise settings.refuse(f"mode {mode}")
    bits = count(values, "bits", settings.where)
    # mlx_lm's mixed recipes write null for the usual size.
    group = count(values, "group_size", settings.where, _USUAL_GROUP)
    if bits not in BITS:
        raise SourceError(
            f"{settings.where}: {module} has {bits} bits; {', '.join(map(str, BITS))} are read"
        )
    if len(words.shape) < 2 or words.shape[-1] * 32 % bits:
        raise SourceError(
            f"{words.file}: tensor {words.name!r} has shape {list(words.shape)}, which is no "
            f"matrix of {bits}-bit codes"
        )
    shape = (*words.shape[:-1], words.shape[-1] * 32 // bits)
    check_group(words, shape[-1], group)
    parts = [words.name, f"{module}.scales", f"{module}.biases"]
    for part in parts[1:]:
        expect_shape(
            take_part(tensors, part, words.name, FLOATS),
            (*shape[:-1], shape[-1] // group),
            f"for groups of {group} in {words.name!r} of {bits} bits",
        )
    kind = describe("MLX", bits, shape[-1], group)
    info = show(words.name, shape, kind, parts, tensors)
    dtype = scale_kind(tensors[parts[1]].dtype)
    grid = IntegerGrid(bits, "edge", *span_of(shape[-1], group), dtype)
    coded = StoredCodes(grid, partial(_codes, module, bits), partial(_ranges, module))
    return RowWeight(info, tuple(parts), partial(_decode, module, bits), coded)


def _codes(module: str, bits: int, source: StoredTensors, start: int, stop: int) -> Codes:
    return unpack_codes(source.load(f"{module}.weight", (start, stop)), bits)


def _ranges(module: str, source: StoredTensors, start: int, stop: int) -> tuple[Floats, Floats]:
    scales = source.load(f"{module}.scales", (start, stop)).astype(np.float32)
    return scales, source.load(f"{module}.biases", (start, stop)).astype(np.float32)


def _decode(module: str, bits: int, source: StoredTensors, start: int, stop: int) -> Floats:
    weights = _codes(module, bits, source, start, stop).astype(np.float32)
    scales, biases = _ranges(module, source, start, stop)
    grouped = weights.reshape(*scales.shape, -1)
    grouped *= scales[:, :, None]
    grouped += biases[:, :, None]
    return weights


def _usage(name: str) -> str:
    return f"mlx_lm.generate --model {name} --prompt 'Once upon a time'"


MLX = Layout(
    name=NAME,
    help="2 to 8 bits with biases, or FP4 and FP8, embeddings and head included, for mlx_lm",
    grids=Grids(
        BITS,
        Packing(_declare, _place, _describe),
        asymmetric="edge",
        group=_USUAL_GROUP,
        groups=GROUPS,
    ),
    presets=list_presets(_describe),
    read=find_mlx,
    embeddings=True,
    stacked=True,
    mixed=True,
    fuses=False,
    usage=_usage,
    library="mlx",
    header="mlx",
)
