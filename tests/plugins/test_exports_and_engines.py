"""Export targets and evaluation engines from other distributions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFReader
from support.plugin import Quantcli, command, install

pytestmark = pytest.mark.slow

CODE = """
TARGET = 7
class Half:
    name = "half"
def opened(source, context, threads):
    return Half()
"""


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Quantcli:
    """The command where a broken target and a broken engine are installed."""
    groups = {
        "quantcli.exports": "seven = odds:TARGET\n",
        "quantcli.engines": "half = odds:opened\n",
    }
    return command(install(tmp_path_factory.mktemp("odds"), "odds", {"odds.py": CODE}, groups))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It is a truth universally acknowledged. " * 60)
    return path


def test_a_target_writes_its_file(quantcli: Quantcli, mini: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    quantcli("quantize", mini, "--bits", "4", "-o", model)
    done = quantcli("export", model, "--to", "names")
    path = tmp_path / "model.names.txt"
    assert done.stdout.split() == [str(path)]
    names = [line.split()[0] for line in path.read_text().splitlines()]
    assert names == [tensor.name for tensor in GGUFReader(model).tensors]
    again = quantcli("export", model, "--to", "names", code=1)
    assert "exists" in again.stderr


def test_a_target_that_is_no_function_is_named(odd: Quantcli, mini: Path) -> None:
    done = odd("export", mini, "--to", "seven", code=2)
    assert "the export format 'seven' of odds 1.0 is no export format" in done.stderr


def test_an_engine_runs(quantcli: Quantcli, mini: Path, text: Path) -> None:
    pytest.importorskip("transformers")
    arguments = ["eval-ppl", mini, "--data", text, "--ctx", "64", "--json"]
    flat, plain = (
        json.loads(quantcli(*arguments, "--engine", name).stdout)["results"][0]["perplexity"]
        for name in ("doubtful", "torch")
    )
    assert flat != plain


def test_an_engine_that_breaks_the_protocol_is_named(odd: Quantcli, mini: Path, text: Path) -> None:
    done = odd("eval-ppl", mini, "--data", text, "--engine", "half", code=2)
    assert "the engine 'half' has no attribute 'vocabulary'" in " ".join(done.stderr.split())
