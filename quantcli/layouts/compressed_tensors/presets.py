"""The schemes of compressed-tensors by the names that llm-compressor and vLLM know them by.

Weights and activations are those of ``PRESET_SCHEMES`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import IntegerGrid
from quantcli.layouts.base import Preset
from quantcli.layouts.compressed_tensors.packed import PACKED
from quantcli.layouts.compressed_tensors.pairs import MXFP4_GRID, MXFP4_PAIRS, NVFP4_PAIRS
from quantcli.layouts.compressed_tensors.single_bytes import (
    E4M3_BYTES,
    INT8_BYTES,
    MXFP8_BYTES,
)


def _inputs(
    kind: str, bits: int, strategy: str, size: int | None = None, *, symmetric: bool = True
) -> dict[str, Any]:
    """Settings of activations whose scales a runtime finds as they come."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": size,
        "dynamic": True,
    }


_STATIC = {"dynamic": False, "observer": "static_minmax"}
"""One scale for whatever comes, of the extremes over all tokens of a text."""
INT8_TOKENS = _inputs("int", 8, "token")
INT8_TOKENS_ASYM = _inputs("int", 8, "token", symmetric=False)
INT8_TENSOR = _inputs("int", 8, "tensor") | _STATIC
INT8_TENSOR_ASYM = _inputs("int", 8, "tensor", symmetric=False) | _STATIC
_FP8_TENSOR = _inputs("float", 8, "tensor") | _STATIC
_FP4_GROUPS = _inputs("float", 4, "tensor_group", 16) | {
    "dynamic": "local",
    "observer": "static_minmax",
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
FP8_TOKENS = _inputs("float", 8, "token")
_FP8_GROUPS = _inputs("float", 8, "group", 128)
_MX_BYTES = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
_MXFP4_GROUPS = _inputs("float", 4, "group", 32) | _MX_BYTES
_MXFP8_GROUPS = _inputs("float", 8, "group", 32) | _MX_BYTES

_INT4 = IntegerGrid(4, "middle", "group", 128, "")
_INT8_ROWS = IntegerGrid(8, "middle", "channel", None, "")
_FP8_WHOLE = FloatGrid("E4M3", "tensor", None, "float", "")
_FP8_ROWS = FloatGrid("E4M3", "channel", None, "float", "")
_FP8_BLOCKS = FloatGrid("E4M3", "block", None, "float", "")
_NVFP4 = FloatGrid("E2M1", "group", 16, "E4M3", "")
_MXFP8 = FloatGrid("E4M3", "group", 32, "E8M0")


def _list_presets() -> list[Preset]:
    found = [
        Preset(
            name=f"W{bits}A16", help=f"{bits}-bit integers in groups of 128",
            grid=replace(_INT4, bits=bits), packing=PACKED,
        )
        for bits in range(2, 9)
    ]  # fmt: skip
    found += [
        Preset(
            name="W4A16_ASYM", help="W4A16 with zero points",
            grid=replace(_INT4, zero="integer"), packing=PACKED,
        ),
        Preset(
            name="W4A8", help="W4A16 for int8 activations",
            grid=_INT4, packing=PACKED, inputs=INT8_TOKENS,
        ),
        Preset(
            name="W4AFP8", help="W4A16 for FP8 activations",
            grid=_INT4, packing=PACKED, inputs=FP8_TOKENS,
        ),
        Preset(
            name="W8A8", help="int8 by row, for int8 activations",
            grid=_INT8_ROWS, packing=INT8_BYTES, inputs=INT8_TOKENS,
        ),
        Preset(
            name="W8A8_ASYM", help="W8A8 with zero points of the activations",
            grid=_INT8_ROWS, packing=INT8_BYTES, inputs=INT8_TOKENS_ASYM,
        ),
        Preset(
            name="W8A8_STATIC", help="W8A8 with one scale for all activations, found on a text",
            grid=_INT8_ROWS, packing=INT8_BYTES, inputs=INT8_TENSOR,
        ),
        Preset(
            name="W8A8_STATIC_ASYM", help="W8A8_STATIC with zero points of the activations",
            grid=_INT8_ROWS, packing=INT8_BYTES, inputs=INT8_TENSOR_ASYM,
        ),
        Preset(
            name="FP8", help="FP8 by matrix, for FP8 activations under a scale found on a text",
            grid=_FP8_WHOLE, packing=E4M3_BYTES, inputs=_FP8_TENSOR, search="minmax",
        ),
        Preset(
            name="FP8_DYNAMIC", help="FP8 by row, for FP8 activations",
            grid=_FP8_ROWS, packing=E4M3_BYTES, inputs=FP8_TOKENS, search="minmax",
        ),
        Preset(
            name="FP8_BLOCK", help="FP8 in blocks of 128 x 128, for FP8 activations",
            grid=_FP8_BLOCKS, packing=E4M3_BYTES, inputs=_FP8_GROUPS, search="minmax",
        ),
        Preset(
            name="NVFP4A16", help="FP4 with an FP8 scale for each 16",
            grid=_NVFP4, packing=NVFP4_PAIRS,
        ),
        Preset(
            name="NVFP4", help="NVFP4A16 for NVFP4 activations, whose largest a text tells",
            grid=_NVFP4, packing=NVFP4_PAIRS, inputs=_FP4_GROUPS,
        ),
        Preset(
            name="MXFP4A16", help="FP4 with a power of two for each 32",
            grid=MXFP4_GRID, packing=MXFP4_PAIRS,
        ),
        Preset(
            name="MXFP4", help="MXFP4A16 for MXFP4 activations",
            grid=MXFP4_GRID, packing=MXFP4_PAIRS, inputs=_MXFP4_GROUPS,
        ),
        Preset(
            name="MXFP4XFP8", help="MXFP4A16 for FP8 activations",
            grid=MXFP4_GRID, packing=MXFP4_PAIRS, inputs=_FP8_GROUPS,
        ),
        Preset(
            name="MXFP8A16", help="FP8 with a power of two for each 32",
            grid=_MXFP8, packing=MXFP8_BYTES,
        ),
        Preset(
            name="MXFP8", help="MXFP8A16 for MXFP8 activations",
            grid=_MXFP8, packing=MXFP8_BYTES, inputs=_MXFP8_GROUPS,
        ),
    ]  # fmt: skip
    return found


PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _list_presets()}
