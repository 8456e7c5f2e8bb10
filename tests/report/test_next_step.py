"""The line after a quantization."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.process import run

from quantcli.plan.recipe import Recipe
from quantcli.report.next_step import next_step
from quantcli.run.quantize import quantize
from quantcli.run.request import Request, Wanted


def made(mini, folder, *wanted):
    events = quantize(Request(str(mini), [Wanted(*each) for each in wanted], dry_run=True))
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize(
    ("installed", "step"),
    [
        ((), "to run it: llama-cli -m m.gguf"),
        (("ollama",), "to run it in Ollama: quantcli export m.gguf --to ollama"),
        (("lms",), "to run it in LM Studio: lms import m.gguf"),
        (("ollama", "llama-cli"), "to run it: llama-cli -m m.gguf"),
    ],
)
def test_a_runtime_that_is_there(mini, tmp_path, monkeypatch, installed, step):
    monkeypatch.chdir(tmp_path)
    outputs = made(mini, tmp_path, (Recipe(type="Q8_0"), Path("m.gguf")))
    assert next_step(outputs, lambda name: name if name in installed else None) == step


@pytest.mark.parametrize(
    ("to", "step"),
    [
        ("compressed-tensors", "to run it: vllm serve 'my folder'"),
        ("mlx", "to run it: mlx_lm.generate --model 'my folder' --prompt 'Once upon a time'"),
    ],
)
def test_folders(mini, tmp_path, monkeypatch, to, step):
    monkeypatch.chdir(tmp_path)
    assert next_step(made(mini, tmp_path, (Recipe(to=to), Path("my folder")))) == step


def test_sets_are_compared(mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = [(Recipe(type=name), Path(f"s/{name}.gguf")) for name in ("Q8_0", "Q4_0")]
    step = "to compare them: quantcli eval-ppl s/*.gguf --speed"
    assert next_step(made(mini, tmp_path, *both)) == step


def test_only_whoever_watches_is_told(mini, tmp_path):
    args = ["quantize", mini, "--bits", "4", "-o", tmp_path / "m.gguf", "--force"]
    assert "llama-cli" not in run(*args).stderr
    seen = run(*args, env={"FORCE_COLOR": "1", "PATH": "/nowhere"})
    assert seen.stderr.rstrip().endswith(f"to run it: llama-cli -m {tmp_path / 'm.gguf'}")
    assert seen.stdout.strip().endswith("m.gguf")
    assert "llama-cli" not in run(*args, "-q", env={"FORCE_COLOR": "1"}).stderr
