"""Quantized checkpoints broken in one named way: a part, a shape, a setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.broken import entry, safetensors

from quantcli.errors import SourceError
from quantcli.sources.hf import open_checkpoint
from quantcli.types import PackedType, row_count

Part = tuple[str, list[int]] | tuple[str, list[int], bytes]
Parts = dict[str, Part]
X = "model.up"


@dataclass(frozen=True)
class Case:
    """What differs from a sound checkpoint: ``None`` takes a tensor or a setting away."""

    base: str
    sentence: str
    tensors: Mapping[str, Part | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tensor: str | None = None


STATE = {
    "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 64],
    "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5,
}  # fmt: skip
NF4 = f"{X}.weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Part:
    text = json.dumps(STATE | changes).encode()
    return ("U8", [len(text)], text)


def raw(text: bytes) -> Part:
    return ("U8", [len(text)], text)


def shape(*extents: int) -> Part:
    return ("I64", [len(extents)], pack(f"<{len(extents)}q", *extents))


def group(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32} | weights}


def groups(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"g": group(**weights)}}


BASES: dict[str, tuple[Parts, dict[str, Any]]] = {
    "gptq": (
        {
            f"{X}.qweight": ("I32", [8, 32]),
            f"{X}.qzeros": ("I32", [2, 4]),
            f"{X}.scales": ("F16", [2, 32]),
            f"{X}.g_idx": ("I32", [64], pack("<64i", *(i // 32 for i in range(64)))),
        },
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
    ),
    "awq": (
        {
            f"{X}.qweight": ("I32", [64, 4]),
            f"{X}.qzeros": ("I32", [2, 4]),
            f"{X}.scales": ("F16", [2, 32]),
        },
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    ),
    "packed": (
        {
            f"{X}.weight_packed": ("I32", [32, 8]),
            f"{X}.weight_scale": ("BF16", [32, 2]),
            f"{X}.weight_zero_point": ("I32", [4, 2]),
            f"{X}.weight_shape": shape(32, 64),
            f"{X}.weight_g_idx": ("I32", [64], pack("<64i", *(i // 32 for i in range(64)))),
        },
        {"quant_method": "compressed-tensors", **groups(symmetric=False)},
    ),
    "int8": (
        {
            f"{X}.weight": ("I8", [32, 64]),
            f"{X}.weight_scale": ("BF16", [32, 1]),
            f"{X}.weight_zero_point": ("I8", [32, 1]),
        },
        {
            "quant_method": "compressed-tensors",
            **groups(num_bits=8, group_size=None, symmetric=False, strategy="channel"),
        },
    ),
    "nvfp4": (
        {
            f"{X}.weight_packed": ("U8", [32, 32]),
            f"{X}.weight_scale": ("F8_E4M3", [32, 4]),
            f"{X}.weight_global_scale": ("F32", [1]),
        },
        {"quant_method": "compressed-tensors", **groups(type="float", group_size=16)},
    ),
    "modelopt": (
        {
            f"{X}.weight": ("U8", [32, 32]),
            f"{X}.weight_scale": ("F8_E4M3", [32, 4]),
            f"{X}.weight_scale_2": ("F32", []),
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ),
    "nf4": (
        {
            f"{X}.weight": ("U8", [128, 1]),
            f"{X}.weight.absmax": ("U8", [4]),
            f"{X}.weight.quant_map": ("F32", [16]),
            f"{X}.weight.nested_absmax": ("F32", [1]),
            f"{X}.weight.nested_quant_map": ("F32", [256]),
            NF4: state(),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "llm.int8": (
        {
            f"{X}.weight": ("I8", [4, 64]),
            f"{X}.SCB": ("F32", [4]),
            f"{X}.weight_format": ("U8", []),
        },
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
    "mlx": (
        {
            f"{X}.weight": ("U32", [32, 8]),
            f"{X}.scales": ("BF16", [32, 2]),
            f"{X}.biases": ("BF16", [32, 2]),
        },
        {"bits": 4, "group_size": 32},
    ),
}

LACKS = "without which they mean nothing"
UNDIVIDED = "has rows of 64 weights, which groups of 48 do not divide"

CASES: dict[str, Case] = {
    # ---- GPTQ
    "GPTQ without scales": Case("gptq", LACKS, {f"{X}.scales": None}, tensor=f"{X}.qweight"),
    "GPTQ without zero points": Case("gptq", LACKS, {f"{X}.qzeros": None}, tensor=f"{X}.qweight"),
    "GPTQ without weights": Case(
        "gptq", "says that the weights are quantized (gptq), but no tensor is",
        {f"{X}.qweight": None},
    ),
    "GPTQ beside floats": Case(
        "gptq", "holds tensor 'model.up.weight' both as it is and as 'model.up.qweight'",
        {f"{X}.weight": ("F32", [32, 64])},
    ),
    "GPTQ scales of another shape": Case(
        "gptq", "has shape [32, 2], expected [2, 32] for groups of 32",
        {f"{X}.scales": ("F16", [32, 2])}, tensor=f"{X}.scales",
    ),
    "GPTQ zero points of another shape": Case(
        "gptq", "has shape [2, 3], expected [2, 4]", {f"{X}.qzeros": ("I32", [2, 3])},
        tensor=f"{X}.qzeros",
    ),
    "GPTQ scales of integers": Case(
        "gptq", "has dtype I32; with 'model.up.qweight' it must be F64 or F32",
        {f"{X}.scales": ("I32", [2, 32])}, tensor=f"{X}.scales",
    ),
    "GPTQ codes of floats": Case(
        "gptq", "has dtype F32", {f"{X}.qweight": ("F32", [8, 32])}, tensor=f"{X}.qweight"
    ),
    "GPTQ of one axis": Case(
        "gptq", "is no matrix of 4-bit codes", {f"{X}.qweight": ("I32", [256])},
        tensor=f"{X}.qweight",
    ),
    "GPTQ rows that fill no word": Case(
        "gptq", "is no matrix of 4-bit codes", {f"{X}.qweight": ("I32", [8, 30])},
        tensor=f"{X}.qweight",
    ),
    "GPTQ of three bits in eight words": Case(
        "gptq", "is no matrix of 3-bit codes", settings={"bits": 3}, tensor=f"{X}.qweight"
    ),
    "GPTQ groups that do not divide": Case(
        "gptq", UNDIVIDED, settings={"group_size": 48}, tensor=f"{X}.qweight"
    ),
    "GPTQ groups of nothing": Case(
        "gptq", "groups of 0 do not divide", settings={"group_size": 0}, tensor=f"{X}.qweight"
    ),
    "GPTQ of other bits": Case(
        "gptq", "expected [4, 2] for groups of 32", settings={"bits": 2}, tensor=f"{X}.qzeros"
    ),
    "GPTQ of five bits": Case(
        "gptq", "model.up has 5 bits; 2, 3, 4, 8 are read", settings={"bits": 5}
    ),
    "GPTQ without bits": Case("gptq", "bits is None; a whole number", settings={"bits": None}),
    "GPTQ with bits in words": Case("gptq", "bits is 'four'", settings={"bits": "four"}),
    "GPTQ for Marlin": Case(
        "gptq", "already quantized with gptq (marlin), which is not read",
        settings={"checkpoint_format": "marlin"},
    ),
    "GPTQ with a group too many": Case(
        "gptq", "names groups 0 to 2, but there are 2",
        {f"{X}.g_idx": ("I32", [64], pack("<64i", *range(2), *[2] * 62))}, tensor=f"{X}.g_idx",
    ),
    "GPTQ with a negative group": Case(
        "gptq", "names groups -1 to 1", tensor=f"{X}.g_idx",
        tensors={f"{X}.g_idx": ("I32", [64], pack("<64i", *[1] * 63, -1))},
    ),
    "GPTQ with groups for other inputs": Case(
        "gptq", "has shape [32], expected [64]", {f"{X}.g_idx": ("I32", [32])},
        tensor=f"{X}.g_idx",
    ),
    "GPTQ with a list of overrides": Case(
        "gptq", "dynamic is not an object", settings={"dynamic": [1]}
    ),
    "GPTQ with a broken pattern": Case(
        "gptq", "dynamic: '(' is no regular expression", settings={"dynamic": {"+:(": {"bits": 8}}}
    ),
    # ---- AWQ
    "AWQ without scales": Case("awq", LACKS, {f"{X}.scales": None}, tensor=f"{X}.qweight"),
    "AWQ without zero points": Case("awq", LACKS, {f"{X}.qzeros": None}, tensor=f"{X}.qweight"),
    "AWQ for GEMV": Case("awq", "with awq (version gemv)", settings={"version": "gemv"}),
    "AWQ of eight bits": Case("awq", "with awq (8 bits)", settings={"bits": 8}),
    "AWQ with zero points in words": Case(
        "awq", "zero_point is 'yes'; true or false", settings={"zero_point": "yes"}
    ),
    "AWQ groups that do not divide": Case(
        "awq", UNDIVIDED, settings={"group_size": 48}, tensor=f"{X}.qweight"
    ),
    "AWQ of one axis": Case(
        "awq", "has shape [256], expected", {f"{X}.qweight": ("I32", [256])},
        tensor=f"{X}.qweight",
    ),
    "AWQ zero points of another shape": Case(
        "awq", "has shape [4, 4], expected [2, 4]", {f"{X}.qzeros": ("I32", [4, 4])},
        tensor=f"{X}.qzeros",
    ),
    # ---- compressed-tensors
    "packed without scale": Case(
        "packed", LACKS, {f"{X}.weight_scale": None}, tensor=f"{X}.weight_packed"
    ),
    "packed without shape": Case(
        "packed", LACKS, {f"{X}.weight_shape": None}, tensor=f"{X}.weight_packed"
    ),
    "asymmetric without zero points": Case(
        "packed", LACKS, {f"{X}.weight_zero_point": None}, tensor=f"{X}.weight_packed"
    ),
    "packed of another shape": Case(
        "packed", "has shape [32, 8], expected [32, 16] for 4-bit codes of 32×128 weights",
        {f"{X}.weight_shape": shape(32, 128)}, tensor=f"{X}.weight_packed",
    ),
    "packed of a negative shape": Case(
        "packed", "gives the shape [32, -64]", {f"{X}.weight_shape": shape(32, -64)},
        tensor=f"{X}.weight_shape",
    ),
    "packed of three extents": Case(
        "packed", "has shape [3], expected [2]", {f"{X}.weight_shape": shape(1, 32, 64)},
        tensor=f"{X}.weight_shape",
    ),
    "packed zero points of another shape": Case(
        "packed", "has shape [2, 4], expected [4, 2]",
        {f"{X}.weight_zero_point": ("I32", [2, 4])}, tensor=f"{X}.weight_zero_point",
    ),
    "packed groups that do not divide": Case(
        "packed", UNDIVIDED, settings=groups(group_size=48), tensor=f"{X}.weight_packed"
    ),
    "packed with a group too many": Case(
        "packed", "names groups 0 to 9, but there are 2", tensor=f"{X}.weight_g_idx",
        tensors={f"{X}.weight_g_idx": ("I32", [64], pack("<64i", *[0] * 63, 9))},
    ),
    "packed although ignored": Case(
        "packed", "model.up holds codes, but", settings={"ignore": ["re:.*up"]}
    ),
    "packed but not targeted": Case(
        "packed", "no group of",
        settings={"config_groups": {"g": group() | {"targets": ["re:.*down"]}}},
    ),
    "no groups": Case("packed", "no group of", settings={"config_groups": {}}),
    "groups in a list": Case(
        "packed", "config_groups is not an object", settings={"config_groups": [group()]}
    ),
    "a preset's name": Case(
        "packed", "config_groups.W4A16 does not say how weights are stored",
        settings={"config_groups": {"W4A16": ["Linear"]}},
    ),
    "two groups for one class": Case(
        "packed", "two groups target 'Linear'",
        settings={"config_groups": {"g": group(), "h": group(num_bits=8)}},
    ),
    "targets in a word": Case(
        "packed", "targets is not a list of names",
        settings={"config_groups": {"g": group() | {"targets": "Linear"}}},
    ),
    "a broken pattern": Case(
        "packed", "'(' is no regular expression", settings={"ignore": ["re:("]}
    ),
    "nine bits": Case("packed", "(int of 9 bits)", settings=groups(num_bits=9)),
    "no bits": Case("packed", "num_bits is 0", settings=groups(num_bits=0)),
    "an unknown strategy": Case("packed", "(strategy row)", settings=groups(strategy="row")),
    "groups of no size": Case(
        "packed", "strategy group has group_size -1",
        settings=groups(strategy="group", group_size=None),
    ),
    "an unknown format": Case(
        "packed", "with compressed-tensors (marlin-24), which is not read",
        settings={"format": "marlin-24"},
    ),
    "sparse": Case(
        "packed", "(sparsity sparse-24-bitmask)",
        settings={"sparsity_config": {"format": "sparse-24-bitmask"}},
    ),
    "rotated at run time": Case(
        "packed", "(transforms at run time)",
        settings={"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
    ),
    "int8 without scale": Case(
        "int8", "is I8 but has no scale beside it", {f"{X}.weight_scale": None},
        tensor=f"{X}.weight",
    ),
    "int8 without zero points": Case(
        "int8", LACKS, {f"{X}.weight_zero_point": None}, tensor=f"{X}.weight"
    ),
    "int8 zero points of another shape": Case(
        "int8", "has shape [32], expected [32, 1]", {f"{X}.weight_zero_point": ("I8", [32])},
        tensor=f"{X}.weight_zero_point",
    ),
    "int8 scales for other rows": Case(
        "int8", "which scales neither the whole, the rows nor the blocks",
        {f"{X}.weight_scale": ("BF16", [31])}, tensor=f"{X}.weight_scale",
    ),
    "int8 groups that do not divide": Case(
        "int8", UNDIVIDED, settings=groups(num_bits=8, group_size=48), tensor=f"{X}.weight"
    ),
    "int8 in a group of floats": Case(
        "int8", "is I8, but config.json makes it float of 8 bits",
        settings=groups(num_bits=8, type="float", group_size=None), tensor=f"{X}.weight",
    ),
    "NVFP4 without scales": Case(
        "nvfp4", LACKS, {f"{X}.weight_scale": None}, tensor=f"{X}.weight_packed"
    ),
    "NVFP4 without its global scale": Case(
        "nvfp4", LACKS, {f"{X}.weight_global_scale": None}, tensor=f"{X}.weight_packed"
    ),
    "FP4 in groups of 64": Case(
        "nvfp4", "a matrix of 4-bit floats in groups of 16 or 32 belongs there",
        settings=groups(type="float", group_size=64), tensor=f"{X}.weight_packed",
    ),
    "NVFP4 scales for other rows": Case(
        "nvfp4", "has shape [16, 4], expected [32, 4]",
        {f"{X}.weight_scale": ("F8_E4M3", [16, 4])}, tensor=f"{X}.weight_scale",
    ),
    "ModelOpt's NVFP4 without its second scale": Case(
        "modelopt",
        LACKS,
        {f"{X}.weight_scale_2": None},
        tensor=f"{X}.weight",
    ),
    "ModelOpt's NVFP4 in groups of 32": Case(
        "modelopt",
        "has shape [32, 2], expected [32, 4] for groups of 16",
        {f"{X}.weight_scale": ("F8_E4M3", [32, 2])},
        tensor=f"{X}.weight_scale",
    ),
    "ModelOpt in mixed precision": Case(
        "modelopt",
        "with modelopt (MIXED_PRECISION)",
        settings={"quant_algo": "MIXED_PRECISION"},
    ),
    # ---- bitsandbytes
    "nf4 without its state": Case("nf4", LACKS, {NF4: None}, tensor=f"{X}.weight"),
    "nf4 without scales": Case(
        "nf4", LACKS, {f"{X}.weight.absmax": None}, tensor=f"{X}.weight"
    ),
    "nf4 without the scales' scales": Case(
        "nf4", LACKS, {f"{X}.weight.nested_absmax": None}, tensor=f"{X}.weight"
    ),
    "nf4 with a state that is no JSON": Case(
        "nf4", "is not a JSON text", {NF4: raw(b"{'a': 1}")}, tensor=NF4
    ),
    "nf4 with a state that is no text": Case(
        "nf4", "is not a JSON text", {NF4: raw(b"\xff\xfe\xfd")}, tensor=NF4
    ),
    "nf4 with a list of states": Case("nf4", "holds a JSON list", {NF4: raw(b"[]")}, tensor=NF4),
    "nf4 with a state of floats": Case(
        "nf4", "should be a JSON text, but is 16 bytes of F32", {NF4: ("F32", [4])}, tensor=NF4
    ),
    "nf4 of no shape": Case("nf4", "gives the shape None", {NF4: state(shape=None)}, tensor=NF4),
    "nf4 of a shape of words": Case(
        "nf4", "gives the shape ['4', 64]", {NF4: state(shape=["4", 64])}, tensor=NF4
    ),
    "nf4 of another shape": Case(
        "nf4", "has 128 bytes, but 512 weights of shape [8, 64] fill 256",
        {NF4: state(shape=[8, 64])}, tensor=f"{X}.weight",
    ),
    "nf4 in other blocks": Case(
        "nf4", "has shape [4], expected [8] for blocks of 32 weights",
        {NF4: state(blocksize=32)}, tensor=f"{X}.weight.absmax",
    ),
    "nf4 in huge blocks": Case(
        "nf4", "gives blocks of 1000000000000 weights", {NF4: state(blocksize=10**12)}, tensor=NF4
    ),
    "nf4 in blocks of nothing": Case(
        "nf4", "blocksize is 0", {NF4: state(blocksize=0)}, tensor=NF4
    ),
    "nf4 with an offset in words": Case(
        "nf4", "nested_offset is 'half'; a number", {NF4: state(nested_offset="half")}, tensor=NF4
    ),
    "nf4 with eight values": Case(
        "nf4", "has shape [8], expected [16]", {f"{X}.weight.quant_map": ("F32", [8])},
        tensor=f"{X}.weight.quant_map",
    ),
    "four bits of another kind": Case(
        "nf4", "is of the unknown kind 'af4'; nf4 and fp4 are read",
        {NF4: None, NF4.replace("nf4", "af4"): state()}, tensor=NF4.replace("nf4", "af4"),
    ),
    "LLM.int8 without scales": Case("llm.int8", LACKS, {f"{X}.SCB": None}, tensor=f"{X}.weight"),
    "LLM.int8 scales for other rows": Case(
        "llm.int8", "has shape [5], expected [4]", {f"{X}.SCB": ("F32", [5])}, tensor=f"{X}.SCB"
    ),
    "LLM.int8 in tiles": Case(
        "llm.int8", "names an order of the codes other than rows",
        {f"{X}.weight_format": ("U8", [], b"\x01")}, tensor=f"{X}.weight_format",
    ),
    "LLM.int8 in an order of another dtype": Case(
        "llm.int8", "has dtype BOOL, whose values are not read",
        {f"{X}.weight_format": ("BOOL", [], b"\x00")}, tensor=f"{X}.weight_format",
    ),
    "LLM.int8 of one axis": Case(
        "llm.int8", "int8 codes of bitsandbytes are a matrix", {f"{X}.weight": ("I8", [256])},
        tensor=f"{X}.weight",
    ),
    # ---- MLX
    "MLX without biases": Case("mlx", LACKS, {f"{X}.biases": None}, tensor=f"{X}.weight"),
    "MLX scales of another shape": Case(
        "mlx", "has shape [32, 4], expected [32, 2]", {f"{X}.scales": ("BF16", [32, 4])},
        tensor=f"{X}.scales",
    ),
    "MLX of seven bits": Case("mlx", "model.up has 7 bits", settings={"bits": 7}),
    "MLX in another mode": Case("mlx", "with mlx (mode mxfp6)", settings={"mode": "mxfp6"}),
    "MLX in a mode that is no name": Case("mlx", "with mlx (mode [4])", settings={"mode": [4]}),
    "MLX floats with scales of affine codes": Case(
        "mlx", "has dtype BF16", settings={"mode": "mxfp4"}, tensor="model.up.scales"
    ),
    "MLX groups that do not divide": Case(
        "mlx", UNDIVIDED, settings={"group_size": 48}, tensor=f"{X}.weight"
    ),
    "MLX of five bits in eight words": Case(
        "mlx", "is no matrix of 5-bit codes", settings={"bits": 5}, tensor=f"{X}.weight"
    ),
    "MLX that is said to be floats": Case(
        "mlx", "is packed, but", settings={X: False}, tensor=f"{X}.weight"
    ),
}  # fmt: skip

SIZES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "I32": 4,
    "U32": 4,
    "I64": 8,
}


def build(folder: Path, case: Case) -> None:
    parts, said = BASES[case.base]
    parts = {k: v for k, v in {**parts, **case.tensors}.items() if v is not None}
    said = {k: v for k, v in {**said, **case.settings}.items() if v is not None}
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, extents, *content) in parts.items():
        size = SIZES[dtype]
        for extent in extents:
            size *= extent
        header[name] = entry(extents, len(data), len(data) + size, dtype)
        data += content[0] if content else bytes(size)
    safetensors(folder / "model.safetensors", header, data)
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))


@pytest.mark.parametrize("base", BASES)
def test_what_the_cases_break_is_sound(base: str, tmp_path: Path) -> None:
    build(tmp_path, Case(base, ""))
    store = open_checkpoint(tmp_path)
    assert list(store.tensors) == [f"{X}.weight"]
    rows, columns = store.tensors[f"{X}.weight"].shape
    assert store.read_rows(f"{X}.weight", 0, rows).shape == (rows, columns)
    store.close()


@pytest.mark.parametrize("name", CASES)
def test_sentence(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    build(tmp_path, case)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(tmp_path)
    said = str(caught.value)
    assert case.sentence in said
    assert str(tmp_path) in said
    assert case.tensor is None or f"tensor {case.tensor!r}" in said
    assert "\n" not in said


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    """They are read as they are, without a warning; quantizing refuses the weights."""
    scales = pack("<64e", *[float("inf")] * 32, *[float("nan")] * 32)
    build(tmp_path, Case("gptq", "", {f"{X}.scales": ("F16", [2, 32], scales)}))
    store = open_checkpoint(tmp_path)
    assert not np.isfinite(store.read_rows(f"{X}.weight", 0, 32)).any()
    store.close()


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 130)
    | st.sampled_from(
        [
            "",
            "gptq",
            "gptq_v2",
            "gemm",
            "group",
            "channel",
            "tensor",
            "int",
            "float",
            "re:.*",
            10**30,
        ]
    )
)
_ANY = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["g", "weights", "targets", X, "bits"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)
_KEYS = [
    "bits", "group_size", "checkpoint_format", "dynamic", "version", "zero_point", "config_groups",
    "ignore", "format", "sparsity_config", "transform_config", "load_in_4bit", "mode", X,
]  # fmt: skip
_WEIGHT_KEYS = [
    "num_bits", "group_size", "type", "strategy", "symmetric", "block_structure",
]  # fmt: skip


@pytest.mark.parametrize("base", BASES)
@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_else_is_wrong(base: str, tmp_path: Path, data: st.DataObject) -> None:
    """Any setting or part may be replaced: it is read whole, or refused in a sentence."""
    draw = data.draw
    parts, said = BASES[base]
    changes = dict(draw(st.dictionaries(st.sampled_from(_KEYS), _ANY, max_size=2)))
    if "config_groups" in said and draw(st.booleans()):
        weights = draw(st.dictionaries(st.sampled_from(_WEIGHT_KEYS), _ANY, max_size=2))
        changes["config_groups"] = {"g": group(**weights)}
    tensors: dict[str, Part | None] = {}
    for name in draw(st.lists(st.sampled_from(sorted(parts)), max_size=2, unique=True)):
        extents = draw(st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 31, 32, 64]), max_size=3))
        dtype = draw(st.none() | st.sampled_from(sorted(SIZES)))
        tensors[name] = None if dtype is None else (dtype, extents)
    build(tmp_path, Case(base, "", tensors, changes))
    try:
        store = open_checkpoint(tmp_path)
    except SourceError:
        return
    try:
        for name, info in store.tensors.items():
            if isinstance(info.dtype, PackedType):
                rows = row_count(info.shape)
                assert store.read_rows(name, 0, rows).size == info.elements
    finally:
        store.close()
