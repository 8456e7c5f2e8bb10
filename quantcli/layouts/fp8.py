"""FP8 checkpoints: which config.json means one, and the scales beside the weights.

What is written is the form of DeepSeek and Qwen: E4M3 under a scale for each 128 x 128 weights. The
scale is named with ``_scale_inv`` (DeepSeek; multiplied all the same) or ``_scale`` (FBGEMM,
ModelOpt, compressed-tensors). Source: DeepSeek-V3's weight_dequant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantcli.errors import SourceError
from quantcli.formats.float_grid import BLOCK, FloatGrid
from quantcli.formats.integer import GridCodes
from quantcli.layouts.base import (
    CacheScales,
    FolderFacts,
    Layout,
    Packing,
    Patch,
    Preset,
    as_stored,
)
from quantcli.layouts.cache_scales import declare_cache, place_cache
from quantcli.layouts.scaled import E4M3, ScaledWeight, build_scaled, fit_scale
from quantcli.layouts.settings import Settings
from quantcli.layouts.stored import StoredTensors
from quantcli.types import Declared, Matrix, TensorInfo

METHODS = ("fp8", "fbgemm_fp8")

_SUFFIXES = ("_scale_inv", "_scale")


def find_fp8(
    tensors: Mapping[str, TensorInfo], settings: Settings | None
) -> dict[str, ScaledWeight]:
    """Every E4M3 weight with its scale; SourceError names the weight that lacks a fitting one.

    ``settings`` are None where config.json says nothing of a quantization.
    """
    block = None
    if settings is not None:
        block = block_size(settings.values.get("weight_block_size"), settings)
    return {
        name: build_scaled(tensors, info, fit_scale(info, find_scale(tensors, info), block))
        for name, info in tensors.items()
        # Zero points of symmetric activations and caches may be E4M3 too.
        if info.dtype == E4M3 and not name.endswith("_zero_point")
    }


def block_size(declared: Any, settings: Settings) -> tuple[int, int] | None:
    """Rows and columns of a scale block as config.json declares them, None when it does not."""
    if declared is None:
        return None
    if (
        not isinstance(declared, list)
        or len(declared) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in declared)
    ):
        raise SourceError(
            f"{settings.path}: weight_block_size is {declared!r}; two positive whole numbers "
            "belong there"
        )
    return declared[0], declared[1]


def find_scale(tensors: Mapping[str, TensorInfo], weight: TensorInfo) -> TensorInfo:
    """The scale beside a weight; SourceError when there is none."""
    for suffix in _SUFFIXES:
        if weight.name + suffix in tensors:
            return tensors[weight.name + suffix]
    kind = "FP8" if weight.dtype == E4M3 else weight.dtype
    raise SourceError(
        f"{weight.file}: tensor {weight.name!r} is {kind} but has no scale beside it "
        f"(looked for {weight.name}_scale_inv and {weight.name}_scale)"
    )


def _declare(matrix: Matrix, grid: FloatGrid) -> list[Declared]:
    shape = (-(-matrix.rows // BLOCK), grid.groups(matrix.columns))
    return [
        Declared(f"{matrix.module}.weight", E4M3, (matrix.rows, matrix.columns)),
        Declared(f"{matrix.module}.weight{_SUFFIXES[0]}", grid.scale_dtype, shape),
    ]


def _place(matrix: Matrix, grid: FloatGrid, start: int, coded: GridCodes) -> Iterator[Patch]:
    yield Patch(f"{matrix.module}.weight", coded.codes, start)
    scales = as_stored(coded.scales[::BLOCK], grid)
    yield Patch(f"{matrix.module}.weight{_SUFFIXES[0]}", scales, start // BLOCK)


def _describe(subject: FolderFacts) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "quant_method": METHODS[0],
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(subject.kept),
    }
    if subject.cache is not None:
        settings["kv_cache_scheme"] = subject.cache
    return {"quantization_config": settings}


def _read(source: StoredTensors, settings: Settings) -> Mapping[str, ScaledWeight]:
    return find_fp8(source.tensors, settings)


FP8 = Layout(
    name=METHODS[0],
    help="FP8 in blocks of 128 x 128, as DeepSeek and Qwen publish it, for vLLM and SGLang",
    presets={
        "FP8_BLOCK": Preset(
            name="FP8_BLOCK",
            help="FP8 in blocks of 128 x 128, for FP8 activations",
            grid=FloatGrid("E4M3", "block", None, "float", "F32"),
            packing=Packing(_declare, _place, _describe),
            search="minmax",
        )
    },
    caches={"fp8": CacheScales("static", declare_cache, place_cache, _describe, "F32")},
    read=_read,
)
