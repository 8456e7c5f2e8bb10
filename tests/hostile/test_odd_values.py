"""Values that a file may hold and its target cannot, or whose square it cannot, make no noise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from quantcli.artifacts.folder_files import to_json
from quantcli.artifacts.gguf_container import lay_out
from quantcli.artifacts.imatrix_container import Calibration, pack_gguf, pack_legacy
from quantcli.cli import app
from quantcli.errors import PlanError, SourceError
from quantcli.evals.windows import cut
from quantcli.plan.model_hparams import read_traits
from quantcli.plan.same_grid import equal_weights
from quantcli.types import MetaValue


def test_half_a_surrogate_pair_stays_an_escape() -> None:
    text = to_json({"a": "\udc80", "b": "ü"})
    assert b"\\udc80" in text
    assert json.loads(text) == {"a": "\udc80", "b": "ü"}
    assert "ü".encode() in to_json({"b": "ü"})


@pytest.mark.parametrize("rope", [[1], "x", 5, {"full_attention": 5, "sliding_attention": [1]}])
def test_rope_parameters_of_another_kind(rope: Any, mini: Path, tmp_path: Path) -> None:
    """Of a family without a table, whose settings go into the folder as they are."""
    folder = tmp_path / "m"
    shutil.copytree(mini, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["NoSuchForCausalLM"], "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config))
    assert app.run(["quantize", str(folder), "--to", "mlx", "-o", str(tmp_path / "o")]) == 0
    assert json.loads((tmp_path / "o" / "config.json").read_text())["rope_parameters"] == rope


def test_an_array_beyond_float32() -> None:
    with pytest.raises(SourceError, match="the key a cannot be"):
        lay_out({"a": MetaValue("[f32]", [0.5, 1e308])}, [])


@pytest.mark.parametrize(
    ("target", "part"),
    [
        (["mlx"], "scales"),
        (["compressed-tensors", "--scheme", "NVFP4A16"], "weight_packed"),
        (["compressed-tensors", "--scheme", "MXFP4A16"], "weight_packed"),
        (["compressed-tensors"], "weight_scale"),
    ],
    ids=["mlx", "NVFP4", "MXFP4", "int4"],
)
def test_weights_whose_square_is_infinite(
    target: list[str], part: str, mini: Path, tmp_path: Path
) -> None:
    """They are rounded as any others, without a warning: a group's extremes are its codes' ends."""
    folder = tmp_path / "m"
    shutil.copytree(mini, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = np.asarray(tensors[name], np.float32) * np.float32(1e25)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    run = ["quantize", str(folder), "--to", *target, "-o", str(tmp_path / "o"), "-t", "1"]
    assert app.run(run) == 0
    with safe_open(tmp_path / "o" / "model.safetensors", "numpy") as file:
        made = file.get_tensor(name.replace("weight", part))
    if part == "weight_packed":
        # Codes are what they are of weights of an ordinary size: about all of them occur.
        assert len(np.unique(made)) > 100
    else:
        assert np.abs(np.asarray(made, np.float32)).max() > 1e20


def test_settings_and_weights_of_two_sizes(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a hidden_size transformers takes 4096 for it."""
    pytest.importorskip("torch")
    folder, text = tmp_path / "m", tmp_path / "t.txt"
    shutil.copytree(mini, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    text.write_text("some words " * 200)
    run = ["calibrate", str(folder), "--data", str(text), "--ctx", "64", "-o", str(tmp_path / "c")]
    assert app.run(run) == 1
    said = capsys.readouterr().err
    assert "has 256 weights, and by config.json its shape is (4096,)" in said


def test_counts_and_names_beyond_an_importance_matrix(tmp_path: Path) -> None:
    name, one = "blk.0.attn_q.weight", np.ones((1, 4))
    sound = Calibration({name: one}, {name: np.ones(1, np.int64)}, ("t",), 1, 512)
    assert pack_legacy(sound)
    assert pack_gguf(sound)
    with pytest.raises(SourceError, match="number of chunks is 4294967295, which the legacy form"):
        pack_legacy(replace(sound, chunks=2**32 - 1))
    many = {name: np.full(1, 2**45)}
    with pytest.raises(SourceError, match=f"number of calls of {name} is 68719476736"):
        pack_legacy(replace(sound, counts=many))
    long = "a" * 5000
    with pytest.raises(SourceError, match="has more than the 4096 bytes that a GGUF holds"):
        pack_gguf(replace(sound, squares={long: one}, counts={long: np.ones(1, np.int64)}))


def test_more_windows_than_any_list_holds() -> None:
    tokens = np.zeros(64, np.int32)
    assert len(cut(tokens, 16, begin=None, chunks=10**30)) == len(cut(tokens, 16, begin=None))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "x"])
def test_heads_that_are_no_count(value: Any) -> None:
    with pytest.raises(PlanError, match=r"llama.attention.head_count should be an integer"):
        read_traits(
            {
                "general.architecture": MetaValue("str", "llama"),
                "llama.block_count": MetaValue("u32", 1),
                "llama.attention.head_count": MetaValue("f32", value),
            }
        )


@pytest.mark.parametrize("to", ["compressed-tensors", "mlx", "gptq"])
def test_blocks_whose_scale_is_no_number(
    to: str, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes of 0 under an infinite scale are no numbers, on any grid."""
    path = tmp_path / "m.gguf"
    assert app.run(["quantize", str(mini), "--type", "Q8_0", "-o", str(path), "-t", "1"]) == 0
    raw, place = bytearray(path.read_bytes()), 0
    for tensor in GGUFReader(path).tensors:
        if tensor.name == "blk.0.ffn_down.weight":
            place = tensor.data_offset
    raw[place : place + 34] = b"\x00\x7c" + bytes(32)
    path.write_bytes(raw)
    capsys.readouterr()
    run = ["export", str(path), "--to", to, "-o", str(tmp_path / "o"), "-t", "1"]
    assert app.run(run) == 1
    said = capsys.readouterr().err
    assert "error: " in said
    assert "internal error" not in said


def test_weights_that_are_no_numbers_equal_none() -> None:
    found = np.array([1, np.inf, np.nan, 3e38, np.inf], np.float32)
    wanted = np.array([1, 1, 1, -3e38, np.inf], np.float32)
    assert equal_weights(found, wanted, exact=False).tolist() == [True, *[False] * 4]
