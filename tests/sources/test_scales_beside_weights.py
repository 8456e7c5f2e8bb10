"""Scales of activations, attention and key-value caches are no weights, whatever lies beside them.

The names are those that compressed-tensors, llm-compressor, AutoFP8, ModelOpt and vLLM's loader
(``maybe_remap_kv_scale_name``) know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantcli.model import open_model
from quantcli.sources.hf import open_checkpoint

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402 - after the skip

CACHES = [
    "k_scale", "v_scale", "kv_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point",
    "prob_scale", "prob_output_scale", "k_proj.k_scale", "v_proj.v_scale", "qkv_proj.k_scale",
    "attn.k_scale", "k_global_scale", "k_cache.scale",
]  # fmt: skip
ACTIVATIONS = [
    "k_proj.output_scale", "v_proj.output_scale", "k_proj.output_zero_point", "q_proj.input_scale",
    "q_proj.input_zero_point", "q_proj.input_global_scale", "q_proj.input_scale_ub",
    "qkv_proj.output_scale", "o_proj.activation_scale",
]  # fmt: skip
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
DENSE = {
    "quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
    "kv_cache_scheme": CACHE,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "none": None,
    "compressed-tensors": DENSE,
    "modelopt": {"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": CACHE},
    "fp8": {"quant_method": "fp8", "kv_cache_scheme": "static"},
}


def write(source: Path, folder: Path, names: list[str], settings: Any, *, fp8: bool) -> Path:
    """A copy with such tensors in every layer; weights as they are or in FP8."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).symlink_to(file)
    found: dict[str, Any] = {}
    for name, value in load_file(source / "model.safetensors").items():
        if fp8 and name.endswith("_proj.weight"):
            scale = value.float().abs().max() / 448
            found[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            found[f"{name}_scale"] = scale.reshape(1)
        else:
            found[name] = value
    for layer in range(2):
        for name in names:
            kind = torch.float8_e4m3fn if name.endswith("zero_point") else torch.float32
            found[f"model.layers.{layer}.self_attn.{name}"] = torch.ones(1).to(kind)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", SETTINGS)
def test_beside_weights_of_16_bits(kind: str, mini: Path, tmp_path: Path) -> None:
    """They do not show, and the weights are those without them."""
    names = CACHES + (ACTIVATIONS if SETTINGS[kind] is not None else [])
    folder = write(mini, tmp_path / "model", names, SETTINGS[kind], fp8=False)
    with open_model(folder) as model, open_model(mini) as plain:
        assert model.store.tensors.keys() == plain.store.tensors.keys()
        assert [tensor.name for tensor in model.tensors] == [t.name for t in plain.tensors]


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"},
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        DENSE | {
            "format": "float-quantized",
            "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
        },
    ],
    ids=["fp8", "modelopt", "compressed-tensors"],
)  # fmt: skip
def test_beside_weights_of_fp8(settings: dict[str, Any], mini: Path, tmp_path: Path) -> None:
    folder = write(mini, tmp_path / "model", CACHES + ACTIVATIONS, settings, fp8=True)
    with open_model(folder) as model, open_model(mini) as plain:
        assert model.store.tensors.keys() == plain.store.tensors.keys()
        kinds = {info.dtype for info in model.store.tensors.values()}
        assert kinds == {"F8_E4M3", "BF16"}


def test_a_folder_of_ones_own_is_read_again(mini: Path, tmp_path: Path) -> None:
    """Static scales and a cache's beside FP8, FP4 and int8; and beside floats."""
    import quantcli

    text = Path(__file__).parents[1] / "golden" / "calibration.txt"
    for schemes in (["FP8"], ["NVFP4"], ["W8A8_STATIC_ASYM"], ["UNQUANTIZED"]):
        folder = quantcli.quantize(
            mini, tmp_path / schemes[0], to="compressed-tensors", scheme=schemes, kv_cache="fp8",
            calibrate=text, chunks=2,
        ).paths[0]  # fmt: skip
        store = open_checkpoint(folder)
        assert not [name for name in store.tensors if name.endswith(("_scale", "_zero_point"))]
        store.close()
        again = tmp_path / f"{schemes[0]}.gguf"
        quantcli.quantize(folder, again, type="Q8_0")
        assert again.stat().st_size > 0
