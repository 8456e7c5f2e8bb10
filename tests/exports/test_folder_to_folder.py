"""A folder's codes in every other layout: the words are other libraries', the weights the same.

Sources are packed by the layouts' definitions or by their own libraries, and what is written is
read by compressed-tensors, by mlx.core and by the unpackers of the tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import packed_layouts
from support.unpackers import AWQ_ORDER, codes_in, unpack_awq, unpack_gptq

import quantcli
from quantcli.errors import PlanError, SourceError, UsageError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
from safetensors.torch import load_file, save_file  # noqa: E402 - after the skip

MODULES = [
    *(f"model.layers.0.self_attn.{part}_proj" for part in "qkv"),
    "model.layers.2.mlp.down_proj",
]
Packed = tuple[dict[str, Any], NDArray[Any]]
"""Tensors of a module by their names below it, and its codes."""


def quantized(weights: NDArray[np.float32], bits: int, group: int, symmetric: bool) -> Any:
    order = np.arange(weights.shape[1]) // min(group, weights.shape[1])
    return packed_layouts.quantize(weights, bits, order, symmetric=symmetric)


def gptq(bits: int = 4, group: int = 128, *, version: int = 1, symmetric: bool = True) -> Any:
    settings = {
        "quant_method": "gptq", "bits": bits, "desc_act": False, "sym": symmetric,
        "group_size": -1 if group > 1000 else group,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version],
    }  # fmt: skip

    def pack(weights: NDArray[np.float32]) -> Packed:
        codes, zeros, scales = quantized(weights, bits, group, symmetric)
        if not symmetric and version == 1:
            zeros = np.maximum(zeros, 1)
        parts = packed_layouts.gptq(codes, zeros, scales, bits, version=version)
        size = min(group, weights.shape[1])
        parts["g_idx"] = (np.arange(weights.shape[1]) // size).astype(np.int32)
        return parts, codes

    return settings, pack


def awq(*, symmetric: bool = False) -> Any:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}

    def pack(weights: NDArray[np.float32]) -> Packed:
        found = quantized(weights, 4, 64, symmetric)
        return packed_layouts.awq(*found), found[0]

    return settings | {"zero_point": True}, pack


def library(bits: int, group: int | None, *, symmetric: bool = True, dtype: Any = None) -> Any:
    """By compressed-tensors itself, with scales in ``dtype`` or bfloat16."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weights_settings = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
        "strategy": "group" if group else "channel", "group_size": group,
    }  # fmt: skip
    settings = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights_settings}},
    }  # fmt: skip
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights_settings})

    def pack(weights: NDArray[np.float32]) -> Packed:
        weight = torch.from_numpy(weights)
        groups = weight.reshape(len(weight), -1, group or weight.shape[1])
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        scale = scale.to(dtype or torch.bfloat16)
        given = {"weight": weight.to(scale.dtype), "weight_scale": scale, "weight_zero_point": zero}
        form = BaseCompressor.get_value_from_registry("pack-quantized")
        parts = form.compress(given, scheme)
        return parts, codes_in(parts["weight_packed"].numpy(), bits)[:, : weight.shape[1]]

    return settings, pack


def mlx_of(bits: int, *, whole: bool) -> Any:
    """MLX's own words; with ``whole`` edges that are a whole number of scales."""
    mx = pytest.importorskip("mlx.core")
    settings = {"group_size": 64, "bits": bits, "mode": "affine"}

    def pack(weights: NDArray[np.float32]) -> Packed:
        words, scales, biases = mx.quantize(
            mx.array(weights).astype(mx.float16), group_size=64, bits=bits
        )
        if whole:
            biases = scales * -float(1 << (bits - 1))
        parts = {"weight": words, "scales": scales, "biases": biases}
        stored = {name: np.array(part) for name, part in parts.items()}
        return stored, codes_in(stored["weight"], bits)

    return settings, pack


SOURCES: dict[str, Callable[[], Any]] = {
    "compressed-tensors": lambda: library(4, 128),
    "compressed-tensors of float16": lambda: library(4, 32, dtype=torch.float16),
    "compressed-tensors asymmetric": lambda: library(4, 128, symmetric=False),
    "compressed-tensors per row": lambda: library(8, None),
    "gptq": lambda: gptq(),
    "gptq asymmetric": lambda: gptq(symmetric=False),
    "gptq-v2 asymmetric": lambda: gptq(version=2, symmetric=False),
    "gptq of 8 bits per row": lambda: gptq(8, 1 << 20),
    "gptq of 3 bits": lambda: gptq(3, 64),
    "awq": lambda: awq(),
    "awq symmetric": lambda: awq(symmetric=True),
    "mlx symmetric": lambda: mlx_of(4, whole=True),
    "mlx of 8 bits": lambda: mlx_of(8, whole=True),
}
TARGETS = ("compressed-tensors", "gptq", "gptq-v2", "awq", "mlx")
REFUSED = {
    ("compressed-tensors per row", "awq"), ("gptq of 8 bits per row", "awq"),
    ("gptq of 3 bits", "awq"), ("mlx of 8 bits", "awq"),
}  # fmt: skip
"""Pairs without a common grid: AWQ has four bits."""


@pytest.fixture(scope="module")
def source(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``source(name)``: the small model with some matrices packed, and their codes."""
    folder = tmp_path_factory.mktemp("sources")
    made: dict[str, tuple[Path, dict[str, NDArray[Any]]]] = {}

    def build(name: str) -> tuple[Path, dict[str, NDArray[Any]]]:
        if name not in made:
            settings, pack = SOURCES[name]()
            made[name] = write_source(mini, folder / name, settings, pack)
        return made[name]

    return build


def write_source(
    mini: Path, folder: Path, settings: dict[str, Any], pack: Any
) -> tuple[Path, dict[str, NDArray[Any]]]:
    tensors, codes = load_file(mini / "model.safetensors"), {}
    for module in MODULES:
        weights = tensors.pop(f"{module}.weight").float().numpy()
        if settings.get("mode"):
            weights = weights.astype(np.float16).astype(np.float32)
        parts, codes[module] = pack(weights)
        stored = {name: torch.as_tensor(part).contiguous() for name, part in parts.items()}
        tensors |= {f"{module}.{name}": part for name, part in stored.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    key = "quantization" if "mode" in settings else "quantization_config"
    config = json.loads((mini / "config.json").read_text()) | {key: settings}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(mini / name, folder / name)
    return folder, codes


def read(folder: Path, module: str) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """A module's weights and codes, by its format's own library or definition."""
    config = json.loads((folder / "config.json").read_text())
    settings = config.get("quantization_config") or config["quantization"]
    found = load_file(folder / "model.safetensors")
    own = {k.removeprefix(f"{module}."): v for k, v in found.items() if k.startswith(f"{module}.")}
    method = settings.get("quant_method", "mlx")
    if method == "compressed-tensors":
        return read_library(settings, own, module)
    if "scales" in own and "biases" in own:
        return read_mlx(settings, own, module)
    arrays = {f"{module}.{name}": part.numpy() if part.dtype != torch.bfloat16 else
              part.float().numpy() for name, part in own.items()}  # fmt: skip
    for pattern, values in settings.get("dynamic", {}).items():
        if pattern.startswith("+:") and module.replace(".", "\\.") in pattern:
            settings = settings | values
    bits = settings["bits"]
    if method == "awq":
        words = codes_in(arrays[f"{module}.qweight"], 4)
        across = np.empty_like(words)
        for nibble, place in enumerate(AWQ_ORDER):
            across[:, place::8] = words[:, nibble::8]
        return unpack_awq(arrays, module, settings), across.T
    return (
        unpack_gptq(arrays, module, {"checkpoint_format": "gptq", **settings}),
        codes_in(arrays[f"{module}.qweight"].T, bits),
    )


def read_library(settings: Any, own: Any, module: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    groups = QuantizationConfig.model_validate(settings).config_groups.values()
    scheme = next(g for g in groups if "Linear" in g.targets or module in g.targets)
    form = BaseCompressor.get_value_from_registry("pack-quantized")
    # The library computes in the scales' dtype.
    given = own | {"weight_scale": own["weight_scale"].float()}
    weights = form.decompress(given, scheme)["weight"].numpy()
    codes = codes_in(own["weight_packed"].numpy(), scheme.weights.num_bits)
    return weights, codes[:, : weights.shape[1]]


def read_mlx(settings: Any, own: Any, module: str) -> Any:
    mx = pytest.importorskip("mlx.core")
    grid = {key: value for key, value in settings.items() if key in ("bits", "group_size")}
    grid |= {key: v for key, v in settings.get(module, {}).items() if key != "mode"}
    words = own["weight"].numpy()
    scales, biases = (mx.array(own[name].float().numpy()) for name in ("scales", "biases"))
    weights = mx.dequantize(mx.array(words.view(np.uint32)), scales, biases, **grid)
    return np.array(weights), codes_in(words, grid["bits"])


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", SOURCES)
def test_codes_and_weights_stay(name: str, to: str, source: Any, tmp_path: Path) -> None:
    folder, codes = source(name)
    if (name, to) in REFUSED:
        with pytest.raises(PlanError, match="does not have") as caught:
            quantcli.export(folder, tmp_path / "out", to=to)
        assert f"quantcli quantize {folder} --to {to}" in str(caught.value.hint)
        assert not (tmp_path / "out").exists()
        return
    done = quantcli.export(folder, tmp_path / "out", to=to)
    assert "bit for bit" in done.summary
    for module in MODULES:
        weights, found = read(tmp_path / "out", module)
        wanted, stored = read(folder, module)
        assert np.array_equal(stored, codes[module])
        assert np.array_equal(found, codes[module]), module
        assert np.array_equal(weights, wanted), module
    # What was a float is the same bytes.
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    kept = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(after[kept], before[kept])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization" in config) == (to == "mlx")


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors asymmetric", "mlx symmetric"])
def test_the_weights_in_floats(name: str, source: Any, tmp_path: Path) -> None:
    folder, _ = source(name)
    quantcli.export(folder, tmp_path / "hf", to="hf", dtype="f32")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for module in MODULES:
        assert np.array_equal(found[f"{module}.weight"].numpy(), read(folder, module)[0])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not config.keys() & {"quantization", "quantization_config"}
    with pytest.raises(SourceError, match="is stored in floats already"):
        quantcli.export(tmp_path / "hf", tmp_path / "again", to="hf")


def shapes(folder: Path) -> dict[str, Any]:
    found = load_file(folder / "model.safetensors")
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}


def test_settings_are_the_formats_own(source: Any, mini: Path, tmp_path: Path) -> None:
    """Those of ``quantize`` with the same modules kept."""
    folder, _ = source("compressed-tensors")
    keep = ["layers.[13]", r"layers\.0\.mlp", r"layers\.2\.self", "o_proj", "gate|up"]
    for to in TARGETS:
        outer = ["embed_tokens"] if to == "mlx" else []
        quantcli.export(folder, tmp_path / f"ex-{to}", to=to)
        quantcli.quantize(
            mini, tmp_path / f"qu-{to}", to=to, keep=[*keep, *outer], group_size=128, range="minmax"
        )
        found, wanted = (
            json.loads((tmp_path / f"{made}-{to}" / "config.json").read_text())
            for made in ("ex", "qu")
        )
        assert found == wanted
        assert shapes(tmp_path / f"ex-{to}") == shapes(tmp_path / f"qu-{to}")


def test_zero_points_of_mlx_that_are_no_whole_numbers(mini: Path, tmp_path: Path) -> None:
    folder, _ = write_source(mini, tmp_path / "mlx", *mlx_of(4, whole=False))
    for to in TARGETS[:-1]:
        with pytest.raises(PlanError, match="is no whole number of scales"):
            quantcli.export(folder, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_zero_points_of_nought_are_not_version_ones(mini: Path, tmp_path: Path) -> None:
    settings, pack = gptq(version=2, symmetric=False)

    def low(weights: NDArray[np.float32]) -> Packed:
        parts, codes = pack(weights)
        parts["qzeros"] = parts["qzeros"].copy()
        parts["qzeros"][-1, -1] &= ~0xF
        return parts, codes

    folder, codes = write_source(mini, tmp_path / "v2", settings, low)
    with pytest.raises(PlanError, match="a zero point is 0, and it holds 1 to 16"):
        quantcli.export(folder, tmp_path / "out", to="gptq")
    for to in ("awq", "compressed-tensors", "mlx"):
        quantcli.export(folder, tmp_path / to, to=to)
        weights, found = read(tmp_path / to, MODULES[3])
        assert np.array_equal(found, codes[MODULES[3]])
        assert np.array_equal(weights, read(folder, MODULES[3])[0])


def test_scales_that_a_format_has_no_dtype_for(mini: Path, tmp_path: Path) -> None:
    settings, pack = library(4, 128)

    def small(weights: NDArray[np.float32]) -> Packed:
        parts, codes = pack(weights)
        return parts | {"weight_scale": parts["weight_scale"] * 2.0**-20}, codes

    folder, codes = write_source(mini, tmp_path / "ct", settings, small)
    done = quantcli.export(folder, tmp_path / "gptq", to="gptq")
    assert any("scales are BF16, since F16 does not hold them" in n.message for n in done.notes)
    for module in MODULES:
        weights, found = read(tmp_path / "gptq", module)
        assert np.array_equal(found, codes[module])
        assert np.array_equal(weights, read(folder, module)[0])
    folder, _ = write_source(mini, tmp_path / "wide", *library(4, 128, dtype=torch.float32))
    with pytest.raises(PlanError, match="F16 does not hold the scale"):
        quantcli.export(folder, tmp_path / "out", to="awq")
    quantcli.export(folder, tmp_path / "back", to="compressed-tensors")
    for module in MODULES:
        assert np.array_equal(read(tmp_path / "back", module)[0], read(folder, module)[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_in_the_order_of_activations(symmetric: bool, mini: Path, tmp_path: Path) -> None:
    """Only GPTQ names the group of each column."""
    settings, pack = gptq(symmetric=symmetric)

    def ordered(weights: NDArray[np.float32]) -> Packed:
        parts, codes = pack(weights)
        order = np.random.default_rng(1).permutation(parts["g_idx"])
        return parts | {"g_idx": order.astype(np.int32)}, codes

    folder, codes = write_source(mini, tmp_path / "src", settings | {"desc_act": True}, ordered)
    for to in ("awq", "mlx", "compressed-tensors"):
        with pytest.raises(PlanError, match=r"\(int4 g128 by activation.*does not have") as caught:
            quantcli.export(folder, tmp_path / "out", to=to)
        assert "rounds the weights a second time" in str(caught.value.hint)
    for to in ("gptq", "gptq-v2"):
        quantcli.export(folder, tmp_path / to, to=to)
        config = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
        assert (config["desc_act"], config["sym"]) == (True, symmetric)
        for module in MODULES:
            weights, found = read(tmp_path / to, module)
            assert np.array_equal(found, codes[module])
            assert np.array_equal(weights, read(folder, module)[0])


@pytest.mark.parametrize("to", ["gptq", "gptq-v2"])
def test_compressed_tensors_groups_in_the_order_of_activations(
    to: str, mini: Path, tmp_path: Path
) -> None:
    """Its older releases wrote them, and GPTQ has a place for them."""
    settings, pack = library(4, 128)

    def ordered(weights: NDArray[np.float32]) -> Packed:
        parts, codes = pack(weights)
        groups = np.arange(weights.shape[1], dtype=np.int32) // 128
        return parts | {"weight_g_idx": np.random.default_rng(1).permutation(groups)}, codes

    folder, codes = write_source(mini, tmp_path / "src", settings, ordered)
    stored = load_file(folder / "model.safetensors")
    quantcli.export(folder, tmp_path / "out", to=to)
    for module in MODULES:
        weights, found = read(tmp_path / "out", module)
        assert np.array_equal(found, codes[module])
        groups = stored[f"{module}.weight_g_idx"].numpy()
        scales = stored[f"{module}.weight_scale"].float().numpy()[:, groups]
        assert np.array_equal(weights, (codes[module].astype(np.float32) - 8) * scales)
    with pytest.raises(PlanError, match=r"\(int4 g128 by activation"):
        quantcli.export(folder, tmp_path / "awq", to="awq")


def test_an_export_may_round(source: Any, tmp_path: Path) -> None:
    folder, _ = source("gptq of 8 bits per row")
    done = quantcli.export(folder, tmp_path / "awq", to="awq", requantize=True)
    assert "rounded" in done.summary
    weights, _ = read(tmp_path / "awq", MODULES[0])
    wanted = read(folder, MODULES[0])[0]
    assert 0.01 < np.linalg.norm(weights - wanted) / np.linalg.norm(wanted) < 0.15


def test_a_checkpoint_in_floats_has_no_codes(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no linear layer that is stored as codes") as caught:
        quantcli.export(mini, tmp_path / "out", to="mlx")
    assert f"quantcli quantize {mini} --to mlx" in str(caught.value.hint)
    with pytest.raises(UsageError, match="--config is for a GGUF"):
        quantcli.export(mini, tmp_path / "out", to="mlx", config=mini)


@pytest.mark.parametrize(
    ("options", "to"),
    [
        ({"to": "compressed-tensors", "scheme": ["FP8_BLOCK"]}, "fp8"),
        ({"to": "fp8"}, "compressed-tensors"),
        ({"to": "compressed-tensors", "scheme": ["MXFP4A16"]}, "mlx"),
        ({"to": "compressed-tensors", "scheme": ["MXFP8A16"]}, "mlx"),
        ({"to": "mlx", "scheme": ["mxfp4"]}, "compressed-tensors"),
        ({"to": "mlx", "scheme": ["mxfp8"]}, "compressed-tensors"),
        ({"to": "mlx", "scheme": ["nvfp4"]}, "compressed-tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_small_floats(options: dict[str, Any], to: str, mini: Path, tmp_path: Path) -> None:
    quantcli.quantize(mini, tmp_path / "source", **options)
    done = quantcli.export(tmp_path / "source", tmp_path / "out", to=to)
    assert "bit for bit" in done.summary
    for module in MODULES:
        found, codes = read_floats(tmp_path / "out", module)
        wanted, stored = read_floats(tmp_path / "source", module)
        assert np.array_equal(found, wanted)
        assert np.array_equal(codes, stored)


def read_floats(folder: Path, module: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Weights and codes of FP8 and FP4, from the definitions, MLX's by mlx.core."""
    import ml_dtypes

    config = json.loads((folder / "config.json").read_text())
    found = load_file(folder / "model.safetensors")
    own = {k.removeprefix(f"{module}."): v for k, v in found.items() if k.startswith(f"{module}.")}
    arrays = {
        name: part.view(torch.uint8).numpy() if part.dtype == torch.float8_e4m3fn else
        part.float().numpy() if part.dtype == torch.bfloat16 else part.numpy()
        for name, part in own.items()
    }  # fmt: skip
    if "scales" in arrays:
        mx = pytest.importorskip("mlx.core")
        settings = config["quantization"]
        words = mx.array(arrays["weight"].view(np.uint32))
        weights = mx.dequantize(words, mx.array(arrays["scales"]), **settings, dtype=mx.float32)
        codes = codes_in(arrays["weight"], settings["bits"])
        return np.array(weights.astype(mx.float32)), codes.astype(np.uint8)
    scales = arrays.get("weight_scale", arrays.get("weight_scale_inv"))
    assert scales is not None
    if "weight_packed" in arrays:
        codes = codes_in(arrays["weight_packed"], 4).astype(np.uint8)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes & 8, -1, 1)
        kind = ml_dtypes.float8_e8m0fnu
        if "weight_global_scale" in arrays:
            kind = ml_dtypes.float8_e4m3fn
        scales = scales.view(kind).astype(np.float32)
        scales = scales / arrays.get("weight_global_scale", np.float32(1))
        width = codes.shape[1] // scales.shape[1]
    else:
        codes = arrays["weight"]
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        if scales.dtype == np.uint8:
            scales, width = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), 32
        else:
            width = 128
            scales = np.repeat(scales, 128, axis=0)[: len(codes)]
    spread = np.repeat(scales, width, axis=1)[:, : codes.shape[1]]
    return (values.astype(np.float32) * spread).astype(np.float32), codes


def test_nvfp4_with_a_scale_of_the_matrix_is_not_mlxs(mini: Path, tmp_path: Path) -> None:
    quantcli.quantize(mini, tmp_path / "nv", to="compressed-tensors", scheme=["NVFP4A16"])
    with pytest.raises(PlanError, match="NVFP4 does not hold the scale"):
        quantcli.export(tmp_path / "nv", tmp_path / "out", to="mlx")


def test_several_grids_where_the_format_has_them(mini: Path, tmp_path: Path) -> None:
    quantcli.quantize(
        mini, tmp_path / "mix", to="compressed-tensors", scheme=["mlp=W8A16", "W4A16"]
    )
    for to in ("gptq", "gptq-v2", "mlx"):
        quantcli.export(tmp_path / "mix", tmp_path / to, to=to)
        for module in MODULES:
            weights, codes = read(tmp_path / to, module)
            wanted, stored = read(tmp_path / "mix", module)
            assert np.array_equal(weights, wanted)
            assert np.array_equal(codes, stored)
    with pytest.raises(PlanError, match=r"whose grid \(int8 g128\) --to awq does not have"):
        quantcli.export(tmp_path / "mix", tmp_path / "awq", to="awq")


def test_a_row_of_one_group_is_of_the_grid_of_the_others(mini: Path, tmp_path: Path) -> None:
    """Rows of 256 and of 768 columns in groups of 256."""
    folder, codes = write_source(mini, tmp_path / "gptq", *gptq(4, 256))
    quantcli.export(folder, tmp_path / "awq", to="awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 256
    for module in MODULES:
        weights, found = read(tmp_path / "awq", module)
        assert np.array_equal(found, codes[module])
        assert np.array_equal(weights, read(folder, module)[0])


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_stacked_and_taken_apart(name: str, tmp_path: Path) -> None:
    from support.tiny_models import build

    model = build(name, tmp_path / "model", dtype="bfloat16")
    quantcli.quantize(model, tmp_path / "ct", to="compressed-tensors", group_size=32)
    quantcli.export(tmp_path / "ct", tmp_path / "mlx", to="mlx")
    block = {"mixtral": "block_sparse_moe", "qwen3-moe": "mlp"}[name]
    part = {"mixtral": "w2", "qwen3-moe": "down_proj"}[name]
    stacked = load_file(tmp_path / "mlx" / "model.safetensors")
    words = stacked[f"model.layers.1.{block}.switch_mlp.down_proj.weight"].numpy()
    before = load_file(tmp_path / "ct" / "model.safetensors")
    for expert in range(4):
        own = before[f"model.layers.1.{block}.experts.{expert}.{part}.weight_packed"].numpy()
        assert np.array_equal(codes_in(words[expert], 4), codes_in(own, 4))
    quantcli.export(tmp_path / "mlx", tmp_path / "back", to="compressed-tensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


def test_a_tied_head_and_packed_embeddings(mini: Path, tmp_path: Path) -> None:
    """MLX packs the embedding, which is the head of a tied model, too."""
    mx = pytest.importorskip("mlx.core")
    quantcli.quantize(mini, tmp_path / "mlx", to="mlx", scheme=["mxfp4"])
    done = quantcli.export(tmp_path / "mlx", tmp_path / "ct", to="compressed-tensors")
    assert any("embed_tokens" in note.message for note in done.notes)
    found = load_file(tmp_path / "ct" / "model.safetensors")
    assert "lm_head.weight" not in found
    stored = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    wanted = mx.dequantize(
        stored["model.embed_tokens.weight"], stored["model.embed_tokens.scales"],
        group_size=32, bits=4, mode="mxfp4",
    )  # fmt: skip
    table = found["model.embed_tokens.weight"].float().numpy()
    assert np.array_equal(table, np.array(wanted.astype(mx.float32)))


def test_modelopts_nvfp4_divides_by_the_reciprocal(mini: Path, tmp_path: Path) -> None:
    """ModelOpt multiplies by its scale of the matrix; codes and block scales are the same bytes."""
    rng = np.random.default_rng(4)

    def pack(weights: NDArray[np.float32]) -> Packed:
        rows, columns = weights.shape
        codes = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
        # Block scales of nought and minus zeros among the codes are as good as others.
        scales = rng.integers(0, 127, (rows, columns // 16), dtype=np.uint8)
        parts = {
            "weight": codes,
            "weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn),
            "weight_scale_2": np.float32(rng.uniform(1e-5, 1e-4)),
            "input_scale": np.float32(0.01),
        }
        return parts, codes

    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    folder, codes = write_source(mini, tmp_path / "modelopt", settings, pack)
    done = quantcli.export(folder, tmp_path / "ct", to="compressed-tensors")
    assert "the same codes and scales" in done.summary
    assert any("4 scales of activations or caches go along" in note.message for note in done.notes)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "ct" / "model.safetensors")
    for module in MODULES:
        assert np.array_equal(after[f"{module}.weight_packed"].numpy(), codes[module])
        assert after[f"{module}.input_global_scale"].item() == pytest.approx(100)
        ours, theirs = (
            each[f"{module}.weight_scale"].view(torch.uint8) for each in (after, before)
        )
        assert torch.equal(ours, theirs)
        whole = before[f"{module}.weight_scale_2"].numpy()
        assert after[f"{module}.weight_global_scale"].numpy() == np.float32(1) / whole
    quantcli.export(folder, tmp_path / "hf", to="hf", dtype="f32")
    wanted = load_file(tmp_path / "hf" / "model.safetensors")
    for module in MODULES:
        found, _ = read_floats(tmp_path / "ct", module)
        assert np.allclose(found, wanted[f"{module}.weight"].numpy(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("to", ["compressed-tensors", "fp8"])
def test_fp8_with_one_scale_for_a_matrix(to: str, mini: Path, tmp_path: Path) -> None:
    def pack(weights: NDArray[np.float32]) -> Packed:
        scale = np.float32(np.abs(weights).max() / 448)
        codes = torch.from_numpy(weights / scale).to(torch.float8_e4m3fn)
        parts = {"weight": codes, "weight_scale": scale, "input_scale": np.float32(0.5)}
        return parts, codes.view(torch.uint8).numpy()

    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    folder, codes = write_source(mini, tmp_path / "source", settings, pack)
    quantcli.export(folder, tmp_path / "out", to=to)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for module in MODULES:
        stored = after[f"{module}.weight"].view(torch.uint8).numpy()
        assert np.array_equal(stored, codes[module])
        name = "weight_scale_inv" if to == "fp8" else "weight_scale"
        assert (after[f"{module}.{name}"] == before[f"{module}.weight_scale"]).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if to == "compressed-tensors":
        (group,) = config["config_groups"].values()
        assert (group["weights"]["strategy"], group["input_activations"]["dynamic"]) == (
            "tensor", False,
        )  # fmt: skip
        for module in MODULES:
            assert after[f"{module}.input_scale"].item() == 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gptq", "awq symmetric", "mlx symmetric"])
def test_transformers_runs_what_was_exported(name: str, source: Any, tmp_path: Path) -> None:
    """In float32 and in the dtype that config.json says."""
    from transformers import AutoModelForCausalLM

    folder, _ = source(name)
    quantcli.export(folder, tmp_path / "ct", to="compressed-tensors")
    quantcli.export(folder, tmp_path / "hf", to="hf", dtype="f32")
    ids = torch.tensor([[5, 300, 7, 1200, 42]])
    with torch.no_grad():
        found, wanted = (
            AutoModelForCausalLM.from_pretrained(tmp_path / each, dtype=torch.float32)(ids).logits
            for each in ("ct", "hf")
        )
        auto = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype="auto")(ids).logits
    assert torch.equal(found, wanted)
    assert float((auto.float() - wanted).norm() / wanted.norm()) < 0.02
