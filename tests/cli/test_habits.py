"""What llama-quantize, the converters and mlx_lm have taught people to type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantcli
from quantcli.cli.app import run

MINI = str(Path(__file__).parents[1] / "data" / "bookworm-mini")
TEXT = str(Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def quantize(*args):
        code = run(["quantize", *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return quantize


@pytest.mark.parametrize(
    ("args", "path"),
    [
        ([MINI, "Q5_0"], "bookworm-mini-Q5_0.gguf"),
        ([MINI, "q4_k_m"], "bookworm-mini-Q4_K_M.gguf"),
        ([MINI, "new.gguf", "Q5_0"], "new.gguf"),
        ([MINI, "new.gguf", "q5_0", "1"], "new.gguf"),
        ([MINI, "out/", "Q5_0", "-t", "1"], "out/bookworm-mini-Q5_0.gguf"),
        (["--pure", MINI, "new.gguf", "Q5_0"], "new.gguf"),
        ([MINI, "--q5_0"], "bookworm-mini-Q5_0.gguf"),
        ([MINI, "--IQ4-NL"], "bookworm-mini-IQ4_NL.gguf"),
        ([MINI, "--outtype", "q8_0", "--outfile", "new.gguf"], "new.gguf"),
        ([MINI, "--outtype=bf16"], "bookworm-mini-BF16.gguf"),
        ([MINI, "--to", "mlx", "--q-bits", "8", "--q-group-size", "32"], "bookworm-mini-mlx-8bit"),
    ],
)
def test_understood(call, args, path):
    assert call(*args, "-q") == (0, f"{path}\n", "")
    assert Path(path).exists()


def test_several_types_as_arguments(call):
    code, out, _ = call(MINI, "out/", "Q4_0,Q5_0", "Q8_0", "-q")
    assert code == 0
    assert out.split() == [f"out/bookworm-mini-{kind}.gguf" for kind in ("Q4_0", "Q5_0", "Q8_0")]


def test_the_same_file(call):
    assert call(MINI, "a.gguf", "Q4_0", "-q")[0] == 0
    quantcli.quantize(MINI, "b.gguf", type="Q4_0")
    assert Path("a.gguf").read_bytes() == Path("b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["m", "-t", "Q4_K_M"], "-t is the number of threads, and Q4_K_M is a type",
         "--type Q4_K_M"),
        (["Q4_K_M", "m"], "Q4_K_M is a type, and the model comes first",
         "quantcli quantize m --type Q4_K_M"),
        (["m", "4"], "4 is neither an output", "quantcli quantize m --bits 4"),
        (["m", "popular"], "popular is neither", "quantcli quantize m --set popular"),
        (["m.gguf", "n.gguf", "COPY"], "COPY is neither", "quantcli export m.gguf --to gguf"),
        (["m", "Q4_KM"], "Q4_KM is neither", "did you mean Q4_K_M?"),
        (["m", "a.gguf", "b.gguf", "Q4_0"], "two outputs, the second b.gguf", "one folder"),
        (["m", "a.gguf", "Q4_0", "-o", "b.gguf"], "both a.gguf and -o b.gguf", "name one"),
        (["m", "Q4_0", "--type", "q4_0"], "--type Q4_0 is given twice", "leave one out"),
        (["m", "--type", "4"], "there is no type 4", "--bits 4 makes a Q4_K_M"),
        (["m", "--bits", "q4_0"], "--bits q4_0 is not a number", "--type Q4_0"),
        (["m", "--q9_k"], "no such option: --q9_k", "see"),
    ],
)  # fmt: skip
def test_answered_with_the_command(call, args, message, hint):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    error, advice = err.splitlines()[-2:]
    assert message in error
    assert hint in advice


def test_a_model_that_is_called_like_a_type(call):
    Path("Q4_0").symlink_to(MINI)
    assert call("Q4_0", "Q8_0", "-q") == (0, "bookworm-mini-Q8_0.gguf\n", "")


@pytest.mark.parametrize("args", [["--text", TEXT], [f"--file={TEXT}"], ["--dataset", TEXT]])
def test_other_tools_names_for_texts(args, capsys):
    pytest.importorskip("torch")
    words = ["eval-ppl", MINI, "--engine", "torch", *args, "--ctx-size", "64", "--chunks", "1"]
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["context"], told["results"][0]["text"]) == (64, TEXT)


def test_behind_two_dashes_nothing_is_an_option(capsys):
    assert run(["eval-ppl", "--", "--text"]) == 1
    assert "--text: there is no such file or folder" in capsys.readouterr().err
