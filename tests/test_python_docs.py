"""The code in docs/python.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import quantcli

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "python.md").read_text()


def test_the_example_runs(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    (tmp_path / "my-model").symlink_to(mini)
    (tmp_path / "prose.txt").symlink_to(ROOT / "tests" / "golden" / "calibration.txt")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    exec(compile(code, "docs/python.md", "exec"), {})
    assert "PhaseBegun(name='quantizing')" in capsys.readouterr().out
    assert (tmp_path / "folder" / "config.json").exists()


def test_every_function_is_named() -> None:
    for name in {*quantcli.__all__} - {"__version__", "open_model"}:
        assert f"`quantcli.{name}`" in DOCS or f"`{name}`" in DOCS
