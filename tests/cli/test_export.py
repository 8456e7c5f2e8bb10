"""The export command: what it prints, its exit codes, and that errors leave nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import process

import quantcli

Run = Callable[..., Any]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: a start of Python for each call would take a minute."""
    from quantcli.cli.app import run as call

    def command(*args: str | Path) -> SimpleNamespace:
        capsys.readouterr()
        code = call([str(arg) for arg in args])
        found = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=found.out, stderr=found.err)

    return command


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mini = Path(__file__).parents[1] / "data" / "bookworm-mini"
    path = tmp_path_factory.mktemp("export") / "mini.gguf"
    return quantcli.quantize(mini, path, type="Q4_0").paths[0]


def test_quiet_prints_the_path_alone(file: Path, tmp_path: Path) -> None:
    run = process.run
    done = run("export", file, "--to", "hf", "-o", tmp_path / "hf", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'hf'}\n", "")
    again = run("export", file, "--to", "hf", "-o", tmp_path / "hf")
    assert again.returncode == 1
    assert again.stderr.splitlines() == [
        f"error: {tmp_path / 'hf'} exists already", "hint: --force replaces it",
    ]  # fmt: skip


def test_json_of_an_export_and_of_its_plan(run: Run, file: Path, tmp_path: Path) -> None:
    plan = json.loads(
        run("export", file, "--to", "gptq", "-o", tmp_path / "g", "--dry-run", "--json").stdout
    )
    assert not (tmp_path / "g").exists()
    done = json.loads(run("export", file, "--to", "gptq", "-o", tmp_path / "g", "--json").stdout)
    assert plan["schema"] == "quantcli.export-plan/1"
    assert done["schema"] == "quantcli.export/1"
    assert done["paths"] == plan["paths"] == [str(tmp_path / "g")]
    size = sum(path.stat().st_size for path in (tmp_path / "g").iterdir())
    assert done["bytes"] == plan["bytes"] == size


def test_a_plan_for_people(run: Run, file: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "hf", tmp_path):
        done = run("export", file, "--to", "hf", "-o", folder, "--dry-run")
        assert done.returncode == 0
        assert "38 tensors in F16" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_verification_tells_errors_and_fails_on_problems(
    run: Run, file: Path, tmp_path: Path
) -> None:
    mini = Path(__file__).parents[1] / "data" / "bookworm-mini"
    done = run("export", file, "--verify", "--against", mini, "--json")
    found = json.loads(done.stdout)
    assert found["schema"] == "quantcli.verify/1"
    assert (found["sound"], found["made_from_source"], done.returncode) == (True, True, 0)
    assert 0.05 < found["error"]["relative_rms"] < 0.1
    table = run("export", file, "--verify", "--against", mini).stdout
    assert "relative error" in table
    assert "sound" in table
    broken = tmp_path / "broken.gguf"
    raw = bytearray(file.read_bytes())
    raw[-18:-16] = b"\x00\x7e"
    broken.write_bytes(raw)
    done = run("export", broken, "--verify")
    assert done.returncode == 1
    assert "1 problem\n" in done.stdout
    assert "error: " in done.stderr
    assert " at row " in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "--to FORMAT is missing"),
        (["--to", "hff"], 2, "there is no export format named 'hff'"),
        (["--to", "hf", "--verify"], 2, "--verify writes nothing, and --to does"),
        (["--to", "hf", "--against", "x"], 2, "--against measures a difference"),
        (["--to", "ollama", "--dtype", "f16"], 2, "--dtype does nothing for --to ollama"),
        (["--to", "gguf", "--split-max-size", "big"], 2, "'big' is not a size"),
        (["--to", "card", "--eval", "nothing.json"], 1, "there is no such file"),
        (["--to", "dat"], 1, "is no importance matrix"),
        (["--to", "mlx", "--tokenizer", "nowhere"], 1, "nowhere is not a folder"),
    ],
)
def test_wrong_calls(run: Run, file: Path, args: list[str], code: int, words: str) -> None:
    before = sorted(file.parent.iterdir())
    done = run("export", file, *args)
    assert done.returncode == code
    assert words in done.stderr
    assert done.stdout == ""
    assert sorted(file.parent.iterdir()) == before


def test_a_card_with_an_evaluation(run: Run, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    text = Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt"
    done = run("eval-ppl", file, "--data", text, "--ctx", "64", "--chunks", "2", "--json")
    result = tmp_path / "eval.json"
    result.write_text(done.stdout)
    path = tmp_path / "card.md"
    assert run("export", file, "--to", "card", "--eval", result, "-o", path).returncode == 0
    perplexity = json.loads(done.stdout)["results"][0]["perplexity"]
    card = path.read_text()
    assert f"{perplexity['value']:.4f} ± {perplexity['error']:.4f}" in card
    assert "2 windows of 64 tokens" in card
    folder = tmp_path / "gptq"
    run("export", file, "--to", "gptq", "-o", folder)
    assert run("export", folder, "--to", "card", "--eval", result).returncode == 1
    assert run("export", folder, "--to", "card", "--eval", result, "--force").returncode == 0
    card = (folder / "README.md").read_text()
    assert "vllm serve gptq" in card
    assert f"{perplexity['value']:.4f}" in card
    assert "GPTQ int4, groups of 32" in card
    result.write_text('{"schema": "quantcli.eval-ppl/1", "results": [{}]}')
    broken = run("export", file, "--to", "card", "--eval", result, "-o", tmp_path / "c.md")
    assert broken.returncode == 1
    assert "the evaluation is damaged" in broken.stderr
