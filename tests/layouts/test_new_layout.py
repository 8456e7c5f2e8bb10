"""CONTRIBUTING.md's layout, one file and one line: written, read back and exported to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.contributing import shown_files
from support.model_folders import CHECKPOINT

from quantcli.cli.app import run
from quantcli.layouts import LAYOUTS
from quantcli.model import open_model


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "toy_layout.py").write_text(shown_files()["toy/layout.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(LAYOUTS._own, "toy", "toy_layout:TOY")
    monkeypatch.chdir(tmp_path)


def call(*args: object) -> None:
    assert run([*map(str, args), "-q"]) == 0


def rows_of(path: str | Path) -> dict[str, np.ndarray]:
    """The weights of the linear layers under their GGUF names."""
    with open_model(path) as model:
        return {
            tensor.name: model.read_rows(tensor, 0, tensor.rows)
            for tensor in model.tensors
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2
        }


def test_quantize_writes_it_and_reads_it_back(tmp_path):
    call("quantize", CHECKPOINT, "--to", "toy", "--bits", 8)
    folder = tmp_path / "bookworm-mini-toy-8bit"
    card = (folder / "README.md").read_text()
    assert "toy run FOLDER" in card
    assert "# bookworm-mini, int8 g64\n" in card
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "toy", "bits": 8, "group_size": 64}
    found, wanted = rows_of(folder), rows_of(CHECKPOINT)
    for name, rows in found.items():
        original = wanted[name].astype(np.float32)
        assert np.abs(rows - original).max() < np.abs(original).max() / 100


def test_a_folder_is_a_source_of_other_formats(capsys):
    call("quantize", CHECKPOINT, "--to", "toy", "--group-size", 32, "-o", "made")
    capsys.readouterr()
    assert run(["inspect", "made", "--json"]) == 0
    kinds = {tensor["dtype"] for tensor in json.loads(capsys.readouterr().out)["tensors"]}
    assert "toy int4, groups of 32" in kinds
    call("export", "made", "--to", "gguf", "-o", "made.gguf")
    call("export", "made.gguf", "--to", "hf", "--dtype", "f32", "-o", "plain")
    for name, rows in rows_of("plain").items():
        np.testing.assert_array_equal(rows_of("made")[name], rows)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_export_stores_a_ggufs_own_codes(kind, bits, tmp_path):
    call("quantize", CHECKPOINT, "--type", kind, "--pure", "-o", "m.gguf")
    call("export", "m.gguf", "--to", "toy", "-o", "made")
    assert "toy run made" in (tmp_path / "made" / "README.md").read_text()
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == bits
    call("export", "m.gguf", "--to", "hf", "--dtype", "f32", "-o", "plain")
    for name, rows in rows_of("plain").items():
        np.testing.assert_array_equal(rows_of("made")[name], rows)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "3"], "--to toy has no 3-bit weights"),
        (["--group-size", "128"], "--group-size 128 is not for --to toy"),
        (["--asymmetric"], "--to toy has no asymmetric weights"),
        (["--activations", "int8"], "--activations is not for --to toy"),
        (["--type", "Q8_0"], "--type is not for --to toy"),
    ],
)
def test_what_it_does_not_hold_is_refused(args, message, capsys):
    assert run(["quantize", str(CHECKPOINT), "--to", "toy", *args]) == 2
    assert message in capsys.readouterr().err


def test_what_it_does_not_take_apart_is_refused(capsys):
    call("quantize", CHECKPOINT, "--type", "Q5_0", "--pure", "-o", "m.gguf")
    assert run(["export", "m.gguf", "--to", "toy"]) == 1
    assert "is Q5_0, whose grid (int5 g32) --to toy does not have" in capsys.readouterr().err
