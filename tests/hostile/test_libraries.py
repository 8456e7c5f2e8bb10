"""What the libraries under us do with odd input: panic, raise anything, ask to run its code."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fuzz.gguf_parts import STRING, string, take_apart
from support.tokenizers_build import byte_level

from quantcli.cli import app
from quantcli.errors import SourceError
from quantcli.evals.engines.llama_cpp import check_metadata
from quantcli.model import open_model

pytest.importorskip("torch")
pytest.importorskip("transformers")


def change(mini: Path, folder: Path, file: str, **values: Any) -> list[str]:
    """A copy of the model with settings of a file changed; the calibration of it."""
    shutil.copytree(mini, folder)
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | values))
    text = folder.with_name("t.txt")
    text.write_text("some words " * 200)
    run = ["calibrate", str(folder), "--data", str(text), "--ctx", "64", "--threads", "1"]
    return [*run, "-o", str(folder.with_name("c.gguf"))]


@pytest.mark.parametrize("name", ["added", "post_processor"])
def test_a_panic_is_a_sentence_alone(
    name: str, mini: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rust writes its own words to the descriptor, wherever the text is split first."""
    length = {"type": "FixedLength", "length": 0}
    split = {"type": "Sequence", "pretokenizers": [length, byte_level()]}
    run = change(mini, tmp_path / "m", "tokenizer.json", pre_tokenizer=split)
    if name == "post_processor":
        # Without key-values of a vocabulary, the token before a text is found by encoding one.
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        config["architectures"] = ["NoSuchForCausalLM"]
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    else:
        run += ["--pre", "llama-bpe"]
    assert app.run(run) == 1
    said = capfd.readouterr().err
    assert "tokenizer.json cannot split this text: chunk size must be non-zero" in said
    assert "panicked" not in said


@pytest.mark.parametrize(
    "values", [{"id2label": "x"}, {"attn_implementation": []}, {"id2label": [1, 2]}]
)
def test_settings_that_fail_within_transformers(
    values: dict[str, Any], mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(change(mini, tmp_path / "m", "config.json", **values)) == 1
    assert "transformers cannot build this llama model: " in capsys.readouterr().err


def test_a_tokenizers_own_code_is_neither_run_nor_offered(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Asked for nothing, transformers asks whoever sits there whether to run it."""
    folder, mark = tmp_path / "m", tmp_path / "mark"
    auto = {"AutoTokenizer": ["own.Own", None]}
    run = change(mini, folder, "config.json", architectures=["NoSuchForCausalLM"], auto_map=auto)
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "Own", "auto_map": auto}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert app.run(run) == 1
    assert not mark.exists()
    assert "internal error" not in capsys.readouterr().err


def test_half_a_pair_in_a_recipe(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('on_fallback: "\\udc80"\n')
    assert app.run(["quantize", str(mini), "--recipe", str(recipe), "--dry-run"]) == 2
    assert "half of a surrogate pair" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (b"llama.block_count", "says that it has 4,294,967,295 blocks"),
        (b"tokenizer.ggml.tokens", "has the token 'a' more than once"),
        (b"tokenizer.ggml.tokens", "has an empty list of tokens"),
        (b"llama.attention.layer_norm_rms_epsilon", "epsilon is nan, no sound number"),
        (b"llama.context_length", "the key-value llama.context_length is 'a'"),
    ],
)
def test_what_llama_cpp_would_not_survive(
    key: bytes, sentence: str, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An assertion of its own ends the process, and so many blocks are counted for ever."""
    pytest.importorskip("llama_cpp")
    path, text = tmp_path / "m.gguf", tmp_path / "t.txt"
    text.write_text("some words " * 200)
    assert app.run(["quantize", str(mini), "--type", "Q8_0", "-o", str(path), "-t", "1"]) == 0
    parts = take_apart(path.read_bytes())
    pair = next(pair for pair in parts.pairs if pair.key == key)
    if pair.items is not None:
        pair.items = [string(b"a")] * (0 if "empty" in sentence else len(pair.items))
    elif key.endswith((b"block_count", b"epsilon")):
        pair.value = b"\xff" * 4
    else:
        pair.code, pair.value = STRING, string(b"a")
    path.write_bytes(parts.pack())
    assert app.run(["eval-ppl", str(path), "--data", str(text), "--ctx", "64"]) == 1
    assert sentence in capsys.readouterr().err


def test_weights_that_llama_cpp_does_not_compute_with(mini: Path, tmp_path: Path) -> None:
    """It calls a function that it does not have."""
    path = tmp_path / "m.gguf"
    assert app.run(["quantize", str(mini), "--type", "Q8_0", "-o", str(path), "-t", "1"]) == 0
    with open_model(path) as model:
        check_metadata(model)
        odd = [replace(t, dtype="Q8_1") if "ffn_up" in t.name else t for t in model.tensors]
        with pytest.raises(SourceError, match=r"weights of type Q8_1, which blk\.0\.ffn_up"):
            check_metadata(replace(model, tensors=tuple(odd)))
