"""Quantized checkpoints as GGUF: gguf decodes the weights that the other layout stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from support import packed_layouts

import quantcli
from quantcli.errors import PlanError
from quantcli.exports.exact import fit_rows
from quantcli.formats import get_format, native

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402 - after the skip

MODULES = {
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k.weight",
    "model.layers.2.mlp.down_proj": "blk.2.ffn_down.weight",
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}


def write_model(
    mini: Path, folder: Path, quantization: dict[str, Any], pack: Any
) -> dict[str, NDArray[np.float32]]:
    """The small model with two matrices packed; returns what these stand for."""
    tensors = load_file(mini / "model.safetensors")
    stands_for = {}
    for module in MODULES:
        weights = tensors.pop(f"{module}.weight").float().numpy()
        parts, values = pack(weights)
        stands_for[module] = values
        tensors |= {f"{module}.{name}": torch.from_numpy(part) for name, part in parts.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((mini / "config.json").read_text())
    key = "quantization" if "mode" in quantization else "quantization_config"
    (folder / "config.json").write_text(json.dumps(config | {key: quantization}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(mini / name, folder / name)
    return stands_for


def gptq(bits: int = 4, group: int = 64, *, version: int = 1, symmetric: bool = True) -> Any:
    def pack(weights: NDArray[np.float32]) -> Any:
        order = np.arange(weights.shape[1]) // group
        found = packed_layouts.quantize(weights, bits, order, symmetric=symmetric)
        parts = packed_layouts.gptq(*found, bits, version=version)
        return parts, packed_layouts.dequantize(*found, order)

    return pack


def awq(weights: NDArray[np.float32]) -> Any:
    order = np.arange(weights.shape[1]) // 64
    codes, zeros, scales = packed_layouts.quantize(weights, 4, order, symmetric=False)
    # Scales of few digits, so that float16 holds their products with the zero points.
    scales = np.exp2(np.round(np.log2(scales.astype(np.float32)))).astype(np.float16)
    found = codes, zeros, scales
    return packed_layouts.awq(*found), packed_layouts.dequantize(*found, order)


def check(path: Path, stands_for: dict[str, NDArray[np.float32]], kind: str) -> None:
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for module, name in MODULES.items():
        values = stands_for[module]
        if "k_proj" in module:
            # GGUF interleaves the two halves of each head.
            values = values.reshape(2, 2, 32, -1).swapaxes(1, 2).reshape(values.shape)
        assert stored[name].tensor_type.name == kind
        found = dequantize(stored[name].data, stored[name].tensor_type)
        assert np.array_equal(found, values), name


CASES = {
    "gptq": (GPTQ, gptq(), "Q4_0"),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(version=2), "Q4_0"),
    "gptq of 8 bits": ({**GPTQ, "bits": 8}, gptq(8), "Q8_0"),
    "gptq of 3 bits": ({**GPTQ, "bits": 3}, gptq(3), "Q4_0"),
    "gptq per row": ({**GPTQ, "group_size": -1}, gptq(4, 10**6), "Q4_0"),
    "awq": (AWQ, awq, "Q4_1"),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_in_blocks(name: str, mini: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from support.llama_logits import llama_logits

    quantization, pack, kind = CASES[name]
    stands_for = write_model(mini, tmp_path / "model", quantization, pack)
    (path,) = quantcli.export(tmp_path / "model", tmp_path / "m.gguf", to="gguf").paths
    check(path, stands_for, kind)
    assert np.isfinite(llama_logits(path, [5, 300, 7])).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_of_float16_scales(bits: int, mini: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    settings = {"group_size": 32, "bits": bits, "mode": "affine"}

    def pack(weights: NDArray[np.float32]) -> Any:
        stored = mx.quantize(mx.array(weights).astype(mx.float16), group_size=32, bits=bits)
        values = mx.dequantize(
            stored[0], *(part.astype(mx.float32) for part in stored[1:]),
            group_size=32, bits=bits,
        )  # fmt: skip
        names = ("weight", "scales", "biases")
        return {n: np.array(p) for n, p in zip(names, stored, strict=True)}, np.array(values)

    stands_for = write_model(mini, tmp_path / "model", settings, pack)
    if bits == 4:
        (path,) = quantcli.export(tmp_path / "model", tmp_path / "m.gguf", to="gguf").paths
        check(path, stands_for, "Q4_1")
        return
    with pytest.raises(PlanError, match="does not fit Q8_0 bit for bit"):
        quantcli.export(tmp_path / "model", tmp_path / "m.gguf", to="gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_zero_points_that_float16_does_not_hold(mini: Path, tmp_path: Path) -> None:
    quantization = {**GPTQ, "sym": False}
    stands_for = write_model(mini, tmp_path / "model", quantization, gptq(symmetric=False))
    with pytest.raises(PlanError, match="does not fit Q4_0 or Q4_1 bit for bit") as caught:
        quantcli.export(tmp_path / "model", tmp_path / "m.gguf", to="gguf")
    assert "--requantize" in str(caught.value.hint)
    assert not list(tmp_path.glob("*m.gguf*"))
    (path,) = quantcli.export(
        tmp_path / "model", tmp_path / "m.gguf", to="gguf", requantize=True
    ).paths
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert stored["blk.2.ffn_down.weight"].tensor_type.name == "Q4_0"
    (path,) = quantcli.export(tmp_path / "model", tmp_path / "f.gguf", to="gguf", dtype="f32").paths
    check(path, stands_for, "F32")


def test_a_late_group_that_does_not_fit_leaves_nothing(mini: Path, tmp_path: Path) -> None:
    """The first rows decide the type; what does not keep to it further on is found, and named."""

    def pack(weights: NDArray[np.float32]) -> Any:
        order = np.arange(weights.shape[1]) // 64
        codes, zeros, scales = packed_layouts.quantize(weights, 4, order, symmetric=True)
        zeros[-1] = 3
        codes[-1] = np.arange(weights.shape[1]) % 16
        found = codes, zeros, scales
        return packed_layouts.gptq(*found, 4, version=1), packed_layouts.dequantize(*found, order)

    write_model(mini, tmp_path / "model", GPTQ, pack)
    with pytest.raises(PlanError, match=r"(down_proj|k_proj).*Q4_0 does not hold the group"):
        quantcli.export(tmp_path / "model", tmp_path / "m.gguf", to="gguf")
    assert not list(tmp_path.glob("*m.gguf*"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_any_block_is_found_again(kind: str) -> None:
    """Random codes and scales of either sign, zeros among them."""
    rng = np.random.default_rng(3)
    fmt = get_format(kind)
    blocks = rng.integers(0, 256, (400, fmt.nbytes), dtype=np.uint8)
    scales = rng.normal(size=(400, len(fmt.half_scales))).astype(np.float16)
    # A zero of few digits, so that a sum of two products is one float32.
    scales[:, 1:] = np.round(scales[:, 1:] * 8) / 8
    scales[:, :1] = np.round(scales[:, :1] * 64) / 64
    scales[::17] = 0
    for place, offset in enumerate(fmt.half_scales):
        blocks[:, offset : offset + 2] = scales[:, place : place + 1].view(np.uint8)
    values = native.decode(fmt, blocks)
    fitted = fit_rows(kind, values, 32)
    assert not fitted.missed.any()
    assert np.array_equal(native.decode(fmt, fitted.packed), values)


def test_what_is_on_no_grid_is_missed() -> None:
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    values[1, 32:] = 0
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        missed = fit_rows(kind, values, 32).missed
        assert missed.tolist() == [[True, True], [True, False], [True, True]]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"to": "compressed-tensors", "scheme": ["NVFP4A16"]}, "NVFP4"),
        ({"to": "mlx", "scheme": ["nvfp4"]}, "NVFP4"),
        ({"to": "mlx", "scheme": ["mxfp4"]}, "MXFP4"),
        ({"to": "compressed-tensors", "scheme": ["MXFP4A16"]}, "MXFP4"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["to"],
)
def test_small_floats_in_blocks(
    options: dict[str, Any], kind: str, mini: Path, tmp_path: Path
) -> None:
    """llama.cpp runs the blocks, whose weights are the folder's; so are codes and block scales."""
    pytest.importorskip("llama_cpp")
    from support.llama_logits import llama_logits

    quantcli.quantize(mini, tmp_path / "folder", **options)
    (path,) = quantcli.export(tmp_path / "folder", tmp_path / "m.gguf", to="gguf").paths
    quantcli.export(tmp_path / "folder", tmp_path / "hf", to="hf", dtype="f32")
    wanted = load_file(tmp_path / "hf" / "model.safetensors")
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for module, name in MODULES.items():
        values = wanted[f"{module}.weight"].numpy()
        if "k_proj" in module:
            values = values.reshape(2, 2, 32, -1).swapaxes(1, 2).reshape(values.shape)
        assert stored[name].tensor_type.name == kind
        found = dequantize(stored[name].data, stored[name].tensor_type)
        scale = stored.get(name.replace(".weight", ".scale"))
        if kind == "NVFP4" and options["to"] != "mlx":
            assert scale is not None
            found = found * scale.data
            assert np.allclose(found, values, rtol=2.0**-22, atol=0)
        else:
            assert scale is None or (scale.data == 1).all()
            assert np.array_equal(found, values)
    back = load_file(tmp_path / "folder" / "model.safetensors")
    if kind == "NVFP4":
        # Of MXFP4 the way back below tells.
        module = "model.layers.2.mlp.down_proj"
        part = "scales" if options["to"] == "mlx" else "weight_scale"
        bytes_ = back[f"{module}.{part}"].view(torch.uint8).numpy()
        blocks = stored[MODULES[module]].data.reshape(-1, 36)
        assert np.array_equal(blocks[:, :4], bytes_.reshape(-1, 4))
    assert np.isfinite(llama_logits(path, [5, 300, 7])).all()
    quantcli.export(path, tmp_path / "again", to=options["to"])
    again = load_file(tmp_path / "again" / "model.safetensors")
    for module in MODULES:
        for part in ("weight_packed", "weight_scale", "weight", "scales"):
            if f"{module}.{part}" in back:
                ours, theirs = again[f"{module}.{part}"], back[f"{module}.{part}"]
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), part


def test_a_scale_that_llama_cpp_does_not_apply_is_refused(tmp_path: Path) -> None:
    from support.tiny_models import build

    changes = {"hidden_size": 64, "intermediate_size": 64}
    model = build("gemma2", tmp_path / "model", changes=changes, dtype="bfloat16")
    quantcli.quantize(model, tmp_path / "ct", to="compressed-tensors", scheme=["NVFP4A16"])
    with pytest.raises(
        PlanError, match=r"llama\.cpp multiplies by no scale of it in gemma2"
    ) as why:
        quantcli.export(tmp_path / "ct", tmp_path / "m.gguf", to="gguf")
    assert "--dtype f16 decodes them" in str(why.value.hint)
