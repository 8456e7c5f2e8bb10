"""Speeds against llama.cpp's own clock, which runs along in the same process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

pytest.importorskip("llama_cpp")

from quantcli.cli.app import run as run_here
from quantcli.errors import SourceError, UsageError
from quantcli.evals import speed as module
from quantcli.evals.artifacts import open_artifact
from quantcli.evals.speed import Speed, SpeedDone, check_speed, measure_speed
from quantcli.types import Note, Progress


@pytest.fixture(scope="module")
def small(mini, tmp_path_factory) -> Path:
    from quantcli import quantize

    return quantize(mini, tmp_path_factory.mktemp("m") / "m.gguf", type="Q4_0").paths[0]


@pytest.fixture
def measure(small):
    def call(**more):
        artifact = open_artifact(str(small))
        with artifact.model:
            return list(measure_speed([artifact], threads=1, **more))

    return call


def test_it_agrees_with_llama_cpp_s_own_clock(measure):
    """Within five percent in one run, whatever else the machine does."""
    *progress, done = measure(runs=3, prompt=256, generation=48)
    assert isinstance(done, SpeedDone)
    found = done.speed
    assert all(isinstance(event, Progress) for event in progress)
    for ours, own in (
        (found.prompt, found.own_prompt),
        (found.generation, found.own_generation),
    ):
        assert len(ours) == len(own) == 3
        assert median(abs(a / b - 1) for a, b in zip(ours, own, strict=True)) < 0.05
        assert max(abs(a / b - 1) for a, b in zip(ours, own, strict=True)) < 0.5
    assert found.prompt_speed == median(found.prompt)
    assert found.generation_speed == median(found.generation)


def test_memory_is_that_of_the_file_and_its_buffers(measure, small):
    speed = measure(runs=1, prompt=64, generation=8)[-1].speed
    size = small.stat().st_size
    # Weights, a cache of 256 tokens, buffers of 64; no second copy of an interpreter.
    assert size < speed.memory < size + 60e6
    assert speed.repacked


def test_a_crash_is_tried_again_without_repacking(measure, tmp_path, monkeypatch):
    """Whatever dies by a signal with repacked weights."""
    child = tmp_path / "crashing_child.py"
    child.write_text(
        "import json, os, signal, sys\n"
        "asked = json.load(sys.stdin)\n"
        "if asked['repack']:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "run = dict(prompt=2.0, generation=1.0, own_prompt=2.0, own_generation=1.0)\n"
        "for _ in range(asked['runs']):\n"
        "    print(json.dumps(run))\n"
        "print(json.dumps(dict(resident=5, device=6)))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "_CHILD", "crashing_child")
    events = measure(runs=2)
    (note,) = [event for event in events if isinstance(event, Note)]
    assert "crashed" in note.message
    expected = Speed((2.0, 2.0), (1.0, 1.0), (2.0, 2.0), (1.0, 1.0), 11, 1, False)
    assert events[-1].speed == expected


def test_what_llama_cpp_refuses_is_said(tmp_path, small, monkeypatch):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(small.read_bytes())
    artifact = open_artifact(str(broken))
    with artifact.model:
        broken.write_bytes(small.read_bytes().replace(b"llama.block_count", b"llama.block_counx"))
        with pytest.raises(SourceError, match=r"broken\.gguf: llama\.cpp cannot run it"):
            list(measure_speed([artifact], threads=1))


def test_a_checkpoint_is_refused_before_anything_runs(mini):
    artifact = open_artifact(str(mini), engine="torch")
    with artifact.model, pytest.raises(UsageError, match="is a checkpoint"):
        check_speed([artifact])


def test_side_by_side_with_accuracy(small, mini, capsys):
    text = mini.parent / "pride-and-prejudice.txt"
    args = ["eval-ppl", str(small), "--speed", "--data", str(text), "--ctx", "64", "--chunks", "2"]
    assert run_here([*args, "--reference", str(small), "-t", "1"]) == 0
    title, header, base, row, *_ = capsys.readouterr().out.splitlines()
    assert "2 windows of 64 tokens" in title
    assert header.split()[:9] == [
        "model", "size", "bits/weight", "memory", "in", "t/s", "out", "t/s", "perplexity",
    ]  # fmt: skip
    assert base.split()[0] == row.split()[0] == str(small)
    assert "The same, as Q8_0 of Llama 3 8B: m.gguf" in _


def test_speed_alone_as_json(small, capsys):
    assert run_here(["eval-ppl", str(small), "--speed", "--json", "-t", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"] == []
    (speed,) = found["speeds"]
    assert (speed["artifact"], speed["threads"]) == (str(small), 1)
    assert (speed["prompt_tokens"], speed["generation_tokens"], len(speed["runs"])) == (512, 128, 5)
    middle = median(run["prompt"] for run in speed["runs"])
    assert speed["prompt_tokens_per_second"] == middle


def test_gates_need_a_text(small, capsys):
    assert run_here(["eval-ppl", str(small), "--speed", "--max-ppl", "9"]) == 2
    assert "--max-ppl needs a text" in capsys.readouterr().err


def test_the_child_loads_no_numpy_before_llama_cpp():
    """It starts anew for each file, so it must not read heavy modules first."""
    code = "import sys, quantcli.evals.speed_child as _; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
