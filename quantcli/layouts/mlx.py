"""MLX's affine mode, as ``mlx_lm`` writes and reads it; embeddings and the head are quantized too.

mlx_lm sees by its scales whether a module is quantized, so nothing lists those that are not. The
experts of a layer are one tensor for each projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantcli.artifacts.safetensors_container import Declared
from quantcli.formats.integer import IntegerCodes, IntegerGrid
from quantcli.layouts.base import Packing, Patch, Subject, as_stored, refuse_never
from quantcli.layouts.packing import mlx as packing
from quantcli.layouts.packing.bits import word_count
from quantcli.types import Matrix


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    name, groups = matrix.module, grid.groups(matrix.columns)
    lead = (matrix.stack,) if matrix.stack else ()
    words = word_count(matrix.columns, grid.bits)
    return [
        Declared(f"{name}.weight", "U32", (*lead, matrix.rows, words)),
        Declared(f"{name}.scales", grid.scale_dtype, (*lead, matrix.rows, groups)),
        Declared(f"{name}.biases", grid.scale_dtype, (*lead, matrix.rows, groups)),
    ]


def _place(matrix: Matrix, grid: IntegerGrid, start: int, coded: IntegerCodes) -> Iterator[Patch]:
    if coded.zeros is None:
        raise ValueError("MLX's layout has biases")
    name, row = matrix.module, matrix.slot * matrix.rows + start
    yield Patch(f"{name}.weight", packing.pack_codes(coded.codes, grid.bits), row)
    yield Patch(f"{name}.scales", as_stored(coded.scales, grid), row)
    yield Patch(f"{name}.biases", as_stored(coded.zeros, grid), row)


def _describe(subject: Subject) -> dict[str, Any]:
    grid = subject.grid
    settings = {"group_size": grid.group_size, "bits": grid.bits, "mode": "affine"}
    return {
        **_older_keys(subject.config),
        "quantization": settings,
        "quantization_config": settings,
    }


def _older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that transformers 5 writes otherwise, and that mlx_lm reads or assumes a default for."""
    keys: dict[str, Any] = {}
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        if "rope_theta" in local:
            keys["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
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


AFFINE = Packing(_declare, _place, _describe, refuse_never)
