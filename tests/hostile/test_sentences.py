"""What is odd in a model ends in one sentence that names it, never as "internal error"."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcli.artifacts.model_card import Card, fence, render_card
from quantcli.cli import app
from quantcli.cli.failures import explain
from quantcli.cli.output import Output

HUGE = 10**400


def _edit(file: str, **values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / file
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(settings | values))

    return edit


def _pre(parts: object) -> Callable[[Path], None]:
    return _edit("tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": parts})


def _nested(folder: Path) -> None:
    inner: Any = []
    for _ in range(200):
        inner = [{"type": "Sequence", "pretokenizers": inner}]
    _pre(inner)(folder)


def _deep(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def _card(license_id: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "README.md").write_text(f"---\nlicense: {license_id}\n---\n")


ODD = {
    "pretokenizers 5": (_pre(5), r"tokenizer\.json .*pretokenizers of a Sequence is no list"),
    "pretokenizers [5]": (_pre([5]), r"tokenizer\.json .*pretokenizers of a Sequence is no list"),
    "pretokenizers {}": (_pre({"a": 1}), r"tokenizer\.json .*pretokenizers of a Sequence"),
    "200 sequences": (_nested, r"tokenizer\.json is nested too deeply"),
    "100,000 brackets": (_deep, r"tokenizer\.json is nested too deeply"),
    "epsilon": (_edit("config.json", rms_norm_eps=HUGE), r"config\.json: .*integer of 401 digits"),
    "epsilon below zero": (
        _edit("config.json", rms_norm_eps=-1e-5),
        r"rms_norm_eps of LlamaForCausalLM .*-1e-05, expected a number from 0 on",
    ),
    "end token as text": (
        _edit("config.json", eos_token_id="</s>"),
        r"odd: eos_token_id is '</s>', expected a token's number",
    ),
    "end tokens as text": (
        _edit("generation_config.json", eos_token_id=[1, {"a": 1}]),
        r"odd: eos_token_id is \{'a': 1\}, expected a token's number",
    ),
    "epsilon beyond float32": (
        _edit("config.json", rms_norm_eps=1e39),
        r"the key llama\.attention\.layer_norm_rms_epsilon cannot be 1e\+39, which no f32",
    ),
    "top_p": (
        _edit("generation_config.json", top_p=-1e308),
        r"generation_config\.json: the value for general\.sampling\.top_p is -1e\+308",
    ),
    "half a pair": (_card('"\\ud800"'), r"README\.md: the value for general\.license has half"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_settings_are_named(
    kind: str, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = ODD[kind]
    folder = tmp_path / "odd"
    shutil.copytree(mini, folder)
    change(folder)
    command = ["quantize", str(folder), "--type", "Q8_0", "-o", str(tmp_path / "o.gguf")]
    assert app.run(command) == 1
    said = capsys.readouterr().err
    assert re.search(f"error: .*{sentence}", said), said
    assert "internal error" not in said


def test_nested_yaml(mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nest = "[" * 3000 + "]" * 3000
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"type: {nest}\n")
    assert app.run(["quantize", str(mini), "--recipe", str(recipe), "--dry-run"]) == 2
    assert "r.yaml: not YAML: nested too deeply" in capsys.readouterr().err
    folder = tmp_path / "odd"
    shutil.copytree(mini, folder)
    _card(nest)(folder)
    assert app.run(["quantize", str(folder), "--to", "mlx", "-o", str(tmp_path / "of")]) == 0


def test_a_folder_and_an_output_that_are_not_utf8(mini: Path, tmp_path: Path) -> None:
    """The card of the former is written, and the latter printed as the bytes that find it."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copytree(mini, folder)
    output = os.fsencode(tmp_path) + b"/out\xe9"
    command = [sys.executable, "-m", "quantcli", "quantize", folder, "--to", "mlx", "-q", "-o"]
    done = subprocess.run([*command, os.fsdecode(output)], capture_output=True, check=True)
    assert done.stdout == output + b"\n"


def test_a_closed_output_is_no_failure(mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.gguf"
    command = f"{sys.executable} -m quantcli quantize {mini} --type Q8_0 -q -o {output} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert output.stat().st_size > 1 << 20


def test_no_further_thread() -> None:
    failure = explain(RuntimeError("can't start new thread"))
    assert failure.message == "the system starts no further thread"
    assert "--threads" in str(failure.hint)
    assert "internal error" in explain(RuntimeError("else")).message


def test_a_catastrophic_expression(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rust's panic is no Exception, so it would end as a traceback."""
    pytest.importorskip("torch")
    folder, text = tmp_path / "odd", tmp_path / "t.txt"
    shutil.copytree(mini, folder)
    pattern = {"Regex": "((a+)+)+$"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    _edit("tokenizer.json", pre_tokenizer=split)(folder)
    text.write_text("a" * 3000 + "! " + "some words " * 200)
    run = ["calibrate", str(folder), "--data", str(text), "--ctx", "64", "-o", str(tmp_path / "c")]
    assert app.run(run) == 1
    assert "tokenizer.json cannot split this text: " in capsys.readouterr().err


def test_an_end_token_that_is_text(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    folder, text = tmp_path / "odd", tmp_path / "t.txt"
    shutil.copytree(mini, folder)
    _edit("config.json", eos_token_id="x")(folder)
    text.write_text("some words " * 200)
    run = ["calibrate", str(folder), "--data", str(text), "--ctx", "64", "-o", str(tmp_path / "c")]
    assert app.run(run) == 1
    said = capsys.readouterr().err
    assert "transformers cannot build this" in said
    assert "'eos_token_id'" in said


def test_json_says_errors_and_sends_no_controls(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["inspect", "/nonexistent/model", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)
    assert (error["schema"], error["exit_code"]) == ("quantcli.error/1", 1)
    assert error["message"].startswith("/nonexistent/model: there is no such")
    assert app.run(["inspect", "m", "--json", "--tensor"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2
    odd = "a\x7f\x9b\u202e\U000e0001é"
    Output(json=True).document("x", 1, {"name": odd})
    printed = capsys.readouterr().out
    assert json.loads(printed)["name"] == odd
    assert printed.rstrip("\n").isprintable()
    assert "é" in printed


def test_a_card_has_no_html_and_no_scripts() -> None:
    told = ["# <img src=x onerror=y>", "[a](javascript:x) [b](https://b)", "[c]: javascript:x"]
    card = render_card(Card({}, [*told, fence("<kept>\n```\n")])).decode()
    assert "<img" not in card
    assert "](javascript" not in card
    assert "[b](https://b)" in card
    assert "\n\\[c]: javascript:x" in card
    assert "````\n<kept>\n```\n" in card


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (b"\xc0\x7f", r"down_proj.weight: the weight nan at row 0, column 20 is not a finite"),
        (
            b"\x00\x7f",
            r"blk.1.ffn_down.weight: the weight 1.7\S+ overflows a float16 scale of Q4_0",
        ),
    ],
    ids=["NaN", "huge"],
)
def test_a_method_names_the_tensor_of_a_bad_weight(
    weight: bytes, sentence: str, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    folder, text = tmp_path / "odd", tmp_path / "t.txt"
    shutil.copytree(mini, folder)
    stored = bytearray((mini / "model.safetensors").read_bytes())
    length = int.from_bytes(stored[:8], "little")
    entry = json.loads(stored[8 : 8 + length])["model.layers.1.mlp.down_proj.weight"]
    place = 8 + length + entry["data_offsets"][0] + 2 * 20
    stored[place : place + 2] = weight
    (folder / "model.safetensors").write_bytes(stored)
    text.write_text("some words " * 600)
    run = ["quantize", str(folder), "--type", "Q4_0", "--method", "gptq", "--chunks", "1"]
    run += ["--calibrate", str(text), "-o", str(tmp_path / "o.gguf")]
    assert app.run(run) == 1
    said = capsys.readouterr().err
    assert re.search(f"error: .*{sentence}", said), said
    assert "internal error" not in said


def test_hints_of_groups_work_when_followed(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The size that a hint names is one of the target's, and its pattern means every layer."""
    plan = ["quantize", str(mini), "--dry-run", "--to"]
    assert app.run([*plan, "mlx", "--group-size", "16"]) == 2
    hint = capsys.readouterr().err.splitlines()[1]
    sizes = re.findall(r"\d+", hint)
    assert sizes == ["32", "64", "128"]
    for size in sizes:
        assert app.run([*plan, "mlx", "--group-size", size]) == 0
    capsys.readouterr()
    stop = ["gptq", "--on-fallback", "error"]
    assert app.run([*plan, *stop, "--group-size", "48"]) == 1
    found = re.search(r"--group-size (\d+) does, or --keep '(\S+)'", capsys.readouterr().err)
    assert found is not None
    assert app.run([*plan, *stop, "--group-size", found[1]]) == 0
    kept = re.compile(found[2])
    assert all(kept.fullmatch(f"model.layers.{n}.self_attn.k_proj") for n in (0, 3, 10))
    capsys.readouterr()
    assert app.run([*plan, *stop, "--group-size", "48", "--keep", found[2]]) == 1
    assert "k_proj" not in capsys.readouterr().err
