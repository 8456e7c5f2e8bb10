"""MLX's affine folders: ``X.weight`` of 32-bit words, ``X.scales`` and ``X.biases``.

A weight is ``scale * code + bias``; embeddings are packed like everything else. config.json gives
bits and group size under ``quantization``, for single modules under their names. Modes other than
"affine" are refused. Source: ``mlx.core.quantize``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from quantcli.errors import SourceError
from quantcli.layouts.packing import mlx
from quantcli.sources.packed.settings import Settings, count
from quantcli.sources.packed.weight import (
    FLOATS,
    Floats,
    RowWeight,
    check_group,
    describe,
    expect_shape,
    load,
    show,
    take_part,
)
from quantcli.sources.shards import Shards
from quantcli.types import TensorInfo

_SUFFIX = ".weight"


def find_mlx(shards: Shards, settings: Settings) -> dict[str, RowWeight]:
    """Every packed matrix; SourceError names the first part that is wrong."""
    return {
        name: _build(shards, info, settings)
        for name, info in shards.tensors.items()
        if info.dtype == "U32" and name.endswith(_SUFFIX)
    }


def _build(shards: Shards, words: TensorInfo, settings: Settings) -> RowWeight:
    tensors, module = shards.tensors, words.name.removesuffix(_SUFFIX)
    own = settings.values.get(module)
    values = {**settings.values, **own} if isinstance(own, Mapping) else settings.values
    if own is False:
        raise SourceError(
            f"{words.file}: tensor {words.name!r} is packed, but {settings.where} says it is not"
        )
    mode = values.get("mode", "affine")
    if mode != "affine":
        raise settings.refuse(f"mode {mode}")
    bits = count(values, "bits", settings.where)
    group = count(values, "group_size", settings.where)
    if bits not in mlx.BITS:
        raise SourceError(
            f"{settings.where}: {module} has {bits} bits; {', '.join(map(str, mlx.BITS))} are read"
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
    return RowWeight(info, tuple(parts), partial(_decode, module, bits))


def _decode(module: str, bits: int, shards: Shards, start: int, stop: int) -> Floats:
    codes = mlx.unpack_codes(load(shards, f"{module}.weight", (start, stop)), bits)
    scales = load(shards, f"{module}.scales", (start, stop)).astype(np.float32)
    biases = load(shards, f"{module}.biases", (start, stop)).astype(np.float32)
    weights = codes.astype(np.float32)
    grouped = weights.reshape(*scales.shape, -1)
    grouped *= scales[:, :, None]
    grouped += biases[:, :, None]
    return weights
