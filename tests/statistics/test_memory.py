"""Two layers' weights and the hidden states bound the memory of a run, whatever the depth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure-calibration-memory"


@pytest.mark.slow
@pytest.mark.parametrize("where", [[], ["--file"]], ids=["memory", "file"])
def test_peak_memory_is_below_two_layers(where: list[str]) -> None:
    command = [sys.executable, str(SCRIPT), "--layer-mb", "256", "--layers", "5", "--windows", "2"]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
