"""Scales of activations and caches go along where the other layout has a place for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcli

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def folder(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder(scheme)``: the small model with static scales, of its activations and its cache."""
    made: dict[str, Path] = {}

    def make(scheme: str) -> Path:
        if scheme not in made:
            output = tmp_path_factory.mktemp("made") / scheme
            done = quantcli.quantize(
                mini, output, to="compressed-tensors", scheme=[scheme], kv_cache="fp8",
                calibrate=TEXT, chunks=1,
            )  # fmt: skip
            made[scheme] = done.paths[0]
        return made[scheme]

    return make


def tensors(folder: Path) -> Tensors:
    found: Tensors = load_file(folder / "model.safetensors")
    return found


def settings(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def as_modelopt(
    source: Path, target: Path, change: Callable[[Tensors], Tensors], kind: str
) -> Path:
    """The folder as NVIDIA's ModelOpt would have written it."""
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    save_file(change(tensors(source)), target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt", "quant_algo": kind, "kv_cache_quant_algo": "FP8",
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    return target


def fp8(stored: Tensors) -> Tensors:
    """Scales in float32 without an axis."""
    return {
        name: value.float().reshape(()) if name.endswith("_scale") else value
        for name, value in stored.items()
    }


def fp4(stored: Tensors) -> Tensors:
    """One name for codes, and scales that multiply."""
    found = {}
    for name, value in stored.items():
        if name.endswith("weight_packed"):
            found[name.removesuffix("_packed")] = value
        elif name.endswith("_global_scale"):
            end = "_scale_2" if name.endswith("weight_global_scale") else "_scale"
            found[name.removesuffix("_global_scale") + end] = (1 / value.float()).reshape(())
        else:
            found[name] = value
    return found


def test_a_cache_goes_to_fp8_and_back(folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = folder("FP8_BLOCK")
    before = {
        name: v for name, v in tensors(source).items() if name.endswith((".k_scale", ".v_scale"))
    }
    assert len(before) == 8
    done = quantcli.export(source, tmp_path / "fp8", to="fp8")
    assert any("8 scales of activations or caches go along" in n.message for n in done.notes)
    assert settings(tmp_path / "fp8")["kv_cache_scheme"] == "static"
    found = tensors(tmp_path / "fp8")
    for name, value in before.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value.float()), name
    quantcli.export(tmp_path / "fp8", tmp_path / "back", to="compressed-tensors")
    assert settings(tmp_path / "back")["kv_cache_scheme"] == settings(source)["kv_cache_scheme"]
    again = tensors(tmp_path / "back")
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_where_there_is_no_place_a_remark_says_so(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    done = quantcli.export(folder("W4A16"), tmp_path / "gptq", to="gptq")
    assert any(
        "8 stored scales of activations or caches are left out" in n.message for n in done.notes
    )
    assert not [
        name for name in tensors(tmp_path / "gptq") if name.endswith(("k_scale", "v_scale"))
    ]


def test_a_cache_that_lacks_a_scale_is_left_out(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    lacking = tmp_path / "lacking"
    shutil.copytree(folder("FP8_BLOCK"), lacking)
    kept = {n: v for n, v in tensors(lacking).items() if n != "model.layers.2.self_attn.v_scale"}
    save_file(kept, lacking / "model.safetensors", {"format": "pt"})
    done = quantcli.export(lacking, tmp_path / "fp8", to="fp8")
    assert any("7 stored scales" in note.message for note in done.notes)
    assert "kv_cache_scheme" not in settings(tmp_path / "fp8")


@pytest.mark.parametrize(("scheme", "kind"), [("FP8", "FP8"), ("NVFP4", "NVFP4")])
def test_modelopts_static_activations_go_to_compressed_tensors(
    scheme: str, kind: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Tensors, settings and logits are those of the folder that was calibrated as such."""
    source = folder(scheme)
    theirs = as_modelopt(source, tmp_path / "modelopt", fp8 if kind == "FP8" else fp4, kind)
    done = quantcli.export(theirs, tmp_path / "out", to="compressed-tensors")
    assert not any("left out" in note.message for note in done.notes)
    assert settings(tmp_path / "out") == settings(source)
    wanted, found = tensors(source), tensors(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        ours = found[name].float().numpy()
        np.testing.assert_allclose(ours, value.float().numpy(), rtol=2**-22, err_msg=name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    _, told = load(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


def test_a_matrix_without_a_scale_keeps_its_kind_from_being_static(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(stored: Tensors) -> Tensors:
        return {
            n: v for n, v in fp4(stored).items() if n != "model.layers.1.mlp.up_proj.input_scale"
        }

    theirs = as_modelopt(folder("NVFP4"), tmp_path / "modelopt", change, "NVFP4")
    done = quantcli.export(theirs, tmp_path / "out", to="compressed-tensors")
    assert any("27 stored scales" in note.message for note in done.notes)
    assert not [
        name
        for name in tensors(tmp_path / "out")
        if "input_scale" in name or "input_global" in name
    ]
    (group,) = settings(tmp_path / "out")["config_groups"].values()
    assert group["input_activations"] is None
