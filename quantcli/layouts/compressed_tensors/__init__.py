"""compressed-tensors, the format of llm-compressor, vLLM and transformers.

A folder may have packed and plain integers, FP8, MXFP4 and NVFP4 side by side: "pack-quantized"
(`packed`), a byte for each weight (`single_bytes`), and pairs of E2M1 codes (`pairs`; read by
`quantcli.layouts.float4`). Names and shapes are those of
compressed-tensors 0.20's compressors. What was written of activations is of no use to a reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantcli.formats.integer import IntegerGrid
from quantcli.layouts.base import CodeGrid, Grids, Layout
from quantcli.layouts.compressed_tensors.groups import METHOD, read_schemes
from quantcli.layouts.compressed_tensors.packed import PACKED, build_words
from quantcli.layouts.compressed_tensors.presets import (
    INT8_TENSOR,
    INT8_TENSOR_ASYM,
    INT8_TOKENS,
    INT8_TOKENS_ASYM,
    PRESETS,
)
from quantcli.layouts.compressed_tensors.single_bytes import INT8_BYTES, build_bytes
from quantcli.layouts.compressed_tensors.static_scales import FP8_CACHE, INPUT_SCALES
from quantcli.layouts.float4 import build_float4
from quantcli.layouts.scaled import E4M3, INT8
from quantcli.layouts.settings import Settings
from quantcli.layouts.stored import PackedWeight, StoredTensors
from quantcli.types import Matrix, Note

_PACKED = "_packed"
_BESIDE = ("_scale", "_zero_point")
"""Endings of what lies beside codes and may have their dtypes."""
_ASYMMETRIC = (
    "transformers loads asymmetric compressed-tensors weights with "
    "CompressedTensorsConfig(dequantize=True) only; vLLM runs them as they are"
)
_WHOLE = (
    "vLLM 0.32 has no integer weights below 8 bits under one scale for a whole tensor; "
    "--group-size channel is what it loads"
)


def find_compressed_tensors(source: StoredTensors, settings: Settings) -> dict[str, PackedWeight]:
    """Every quantized weight; SourceError names the first part that is wrong."""
    coded = {
        name: name.removesuffix(_PACKED)
        for name, info in source.tensors.items()
        if name.endswith(_PACKED) or (info.dtype in (E4M3, INT8) and not name.endswith(_BESIDE))
    }
    schemes = read_schemes(settings, [weight.removesuffix(".weight") for weight in coded.values()])
    found: dict[str, PackedWeight] = {}
    for name, weight in coded.items():
        info = source.tensors[name]
        scheme = schemes.find(weight.removesuffix(".weight"), info.file)
        if weight == name:
            found[weight] = build_bytes(source, info, scheme)
        elif scheme.kind == "float":
            if scheme.bits != 4:
                raise settings.refuse(f"packed floats of {scheme.bits} bits")
            found[weight] = build_float4(
                source, info, weight, METHOD, scheme.group, whole=f"{weight}_global_scale",
                divides=True,
            )  # fmt: skip
        else:
            found[weight] = build_words(source, info, weight, scheme)
    return found


def _remark(grid: CodeGrid, matrices: Sequence[Matrix]) -> Iterator[Note]:
    if not grid.symmetric and grid.strategy != "tensor":
        yield Note(_ASYMMETRIC, refused_by="transformers")
    if isinstance(grid, IntegerGrid) and grid.strategy == "tensor" and grid.bits < 8:
        yield Note(_WHOLE, refused_by="vLLM")


def _int8_weights(inputs: Mapping[str, Any]) -> Grids:
    """Weights of one byte for activations of these settings."""
    return Grids(
        (8,),
        INT8_BYTES,
        "middle",
        group="channel",
        groups=None,
        strategies=("channel", "tensor"),
        computes_in_scales=True,
        inputs=inputs,
    )


COMPRESSED_TENSORS = Layout(
    name=METHOD,
    help="2 to 8 bits, FP8 and FP4 as llm-compressor stores them, for vLLM and transformers",
    grids=Grids(
        tuple(range(2, 9)),
        PACKED,
        "middle",
        "integer",
        strategies=("channel", "tensor"),
        computes_in_scales=True,
    ),
    activations={
        "int8": _int8_weights(INT8_TOKENS),
        "int8:asymmetric": _int8_weights(INT8_TOKENS_ASYM),
        "int8:static": _int8_weights(INT8_TENSOR),
        "int8:static:asymmetric": _int8_weights(INT8_TENSOR_ASYM),
    },
    presets=PRESETS,
    shorthands={
        ("int8", 4): "W4A8",
        ("fp8", 4): "W4AFP8",
        ("fp8", 8): "FP8_DYNAMIC",
        ("fp8:static", 8): "FP8",
    },
    inputs=INPUT_SCALES,
    caches={"fp8": FP8_CACHE},
    read=find_compressed_tensors,
    mixed=True,
    remark=_remark,
)
