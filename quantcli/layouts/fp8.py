"""FP8 checkpoints: which config.json means one, and the scales beside the weights.

The scale is named with ``_scale_inv`` (DeepSeek; multiplied all the same) or ``_scale`` (FBGEMM,
ModelOpt, compressed-tensors). Source: DeepSeek-V3's weight_dequant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantcli.errors import SourceError
from quantcli.layouts.scaled import E4M3, ScaledWeight, build_scaled, fit_scale
from quantcli.layouts.settings import Settings
from quantcli.types import TensorInfo

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
        if info.dtype == E4M3
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
