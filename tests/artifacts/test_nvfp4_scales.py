"""A GGUF of NVFP4 with its tensors' scales: llama.cpp computes what its weights decode to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from safetensors.numpy import load_file
from support.tiny_models import build

import quantcli
from quantcli.errors import PlanError, UsageError

pytest.importorskip("llama_cpp")

TOKENS = [7, 300, 5, 1200, 42, 9, 77, 500] * 3


def make(source: Path, target: Path, **options: Any) -> Path:
    options = {"type": "NVFP4", "threads": 2, "force": True} | options
    return quantcli.quantize(source, target, **options).paths[0]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def scaled(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(mini, tmp_path_factory.mktemp("scaled") / "m.gguf")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose rows fill NVFP4's blocks."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 128}
    # All of them run, so that no rounded activation sends a token elsewhere.
    sizes["num_experts_per_tok"] = 4
    folder = tmp_path_factory.mktemp("experts")
    return build("qwen3-moe", folder, dtype="bfloat16", changes=sizes)


def test_every_matrix_of_a_layer_has_one_number(scaled: Path) -> None:
    tensors = {tensor.name: tensor for tensor in GGUFReader(scaled).tensors}
    weights = [name for name, tensor in tensors.items() if tensor.tensor_type.name == "NVFP4"]
    beside = [name for name in weights if name.replace(".weight", ".scale") in tensors]
    assert beside == weights
    assert len(beside) == 4 * 7
    for name in beside:
        scale = tensors[name.replace(".weight", ".scale")]
        assert (scale.tensor_type.name, list(scale.shape)) == ("F32", [1])
        codes = np.asarray(tensors[name].data).reshape(-1, 36)[:, :4]
        assert codes.max() >= 0x7C  # Nearly all of UE4M3's range is used.


def test_llama_cpp_computes_with_them(scaled: Path, mini: Path, tmp_path: Path) -> None:
    """Its kernels round activations to 8 bits, for NVFP4 without scales as much as with them."""
    from support.llama_logits import llama_logits

    found = []
    for name, file in (("s", scaled), ("n", make(mini, tmp_path / "n.gguf", range="minmax"))):
        folder = quantcli.export(file, tmp_path / name, to="hf", dtype="f32").paths[0]
        wanted = llama_logits(make(folder, tmp_path / "f.gguf", type="F32"), TOKENS)
        found.append(relative(llama_logits(file, TOKENS), wanted))
    assert max(found) < 0.015


def test_a_folder_has_the_same_weights(scaled: Path, mini: Path, tmp_path: Path) -> None:
    ours = make(mini, tmp_path / "hf", to="hf", dtype="F32")
    theirs = quantcli.export(scaled, tmp_path / "back", to="hf", dtype="f32").paths[0]
    wanted = load_file(theirs / "model.safetensors")
    found = load_file(ours / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_stack_has_a_number_for_each_expert(experts: Path, tmp_path: Path) -> None:
    from support.llama_logits import llama_logits

    file = make(experts, tmp_path / "m.gguf", pure=True)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert list(tensors["blk.0.ffn_down_exps.scale"].shape) == [4]
    folder = quantcli.export(file, tmp_path / "back", to="hf", dtype="f32").paths[0]
    wanted = llama_logits(make(folder, tmp_path / "f.gguf", type="F32"), TOKENS)
    assert relative(llama_logits(file, TOKENS), wanted) < 0.03
    stored = load_file(folder / "model.safetensors")
    down = tensors["blk.0.ffn_down_exps.weight"]
    values = dequantize(np.asarray(down.data), down.tensor_type)[2]
    values = values * np.float32(tensors["blk.0.ffn_down_exps.scale"].data[2])
    assert np.array_equal(stored["model.layers.0.mlp.experts.2.down_proj.weight"], values)


def test_the_rule_without_search_is_llama_cpps(mini: Path, tmp_path: Path) -> None:
    plain = make(mini, tmp_path / "m.gguf", range="minmax")
    tensors = {tensor.name: tensor for tensor in GGUFReader(plain).tensors}
    assert not [name for name in tensors if name.endswith(".scale")]


def test_it_is_verified_against_its_source(scaled: Path, mini: Path, tmp_path: Path) -> None:
    naive = make(mini, tmp_path / "n.gguf", range="minmax")
    errors = []
    for file in (scaled, naive):
        found = quantcli.export(file, verify=True, against=mini).document
        assert found["sound"]
        assert found["made_from_source"]
        errors.append(found["error"]["relative_rms"])
    assert errors[0] < 0.9 * errors[1]


def test_another_gguf_keeps_them(scaled: Path, tmp_path: Path) -> None:
    """Blocks are copied with their scales, and what is rounded again is multiplied by them too."""
    from support.llama_logits import llama_logits

    again = make(scaled, tmp_path / "same.gguf")
    other = make(scaled, tmp_path / "q8.gguf", type="Q8_0", allow_requantize=True)
    wanted = llama_logits(scaled, TOKENS)
    assert np.array_equal(llama_logits(again, TOKENS), wanted)
    assert relative(llama_logits(other, TOKENS), wanted) < 0.02


@pytest.mark.slow
def test_error_feedback_rounds_under_them(mini: Path, scaled: Path, tmp_path: Path) -> None:
    from support.llama_logits import llama_logits

    text = Path(__file__).parent.parent / "data" / "pride-and-prejudice.txt"
    fed = make(mini, tmp_path / "g.gguf", method="gptq", calibrate=[text], chunks=16)
    assert [t.name for t in GGUFReader(fed).tensors] == [t.name for t in GGUFReader(scaled).tensors]
    whole = llama_logits(make(mini, tmp_path / "f.gguf", type="F32"), TOKENS)
    assert relative(llama_logits(fed, TOKENS), whole) < relative(
        llama_logits(scaled, TOKENS), whole
    )


@pytest.mark.parametrize(
    ("options", "refused", "words"),
    [
        ({"type": "Q4_K_M", "range": "mse"}, PlanError, "no tensor becomes that"),
        ({"range": "imatrix"}, UsageError, "needs an importance matrix"),
        ({"range": "best"}, UsageError, "not one of"),
    ],
    ids=["no NVFP4", "no matrix", "no such range"],
)
def test_ranges_that_mean_nothing_are_refused(
    mini: Path, tmp_path: Path, options: dict[str, Any], refused: type[Exception], words: str
) -> None:
    with pytest.raises(refused, match=words):
        make(mini, tmp_path / "m.gguf", **options)
