"""A wheel, installed where nothing else is, does a newcomer's first steps."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(command: list[str | Path], cwd: Path, *, code: int = 0) -> subprocess.CompletedProcess[str]:
    # What the tests' own environment has must not be seen.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder]
    constraints = ["-c", ROOT / "constraints.txt"]
    run([*pip, *constraints, "-C", f"build-dir={folder / 'build'}", ROOT], ROOT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel and its base dependencies."""
    folder = tmp_path_factory.mktemp("bare")
    run([sys.executable, "-m", "venv", folder], ROOT)
    python = folder / "bin" / "python"
    constraints = ["-c", ROOT / "constraints.txt"]
    run([python, "-m", "pip", "install", "-q", *constraints, wheel], folder)
    return folder / "bin"


def test_the_wheel_serves_every_python_and_holds_the_recipes(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"quantcli/configs/{path.name}" for path in (ROOT / "configs").iterdir()} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "configs/"))]


def test_the_first_steps(bare: Path, mini: Path, tmp_path: Path) -> None:
    for module in ("torch", "transformers", "llama_cpp"):
        run([bare / "python", "-c", f"import {module}"], tmp_path, code=1)
    assert "llama" in run([bare / "quantcli", "inspect", mini], tmp_path).stdout
    command: list[str | Path] = [bare / "quantcli", "quantize", mini, "-q"]
    made = run([*command, "--bits", "4"], tmp_path).stdout.strip()
    assert (tmp_path / made).read_bytes()[:4] == b"GGUF"
    named = run([*command, "--recipe", "q4_k_m-head8", "-o", "head8.gguf"], tmp_path).stdout.strip()
    assert (tmp_path / named).stat().st_size > (tmp_path / made).stat().st_size
    folder = run([*command, "--to", "compressed-tensors"], tmp_path).stdout.strip()
    assert (tmp_path / folder / "config.json").is_file()


def test_what_is_not_installed_is_named(bare: Path, mini: Path, tmp_path: Path) -> None:
    made = run([bare / "quantcli", "quantize", mini, "-q"], tmp_path).stdout.strip()
    text = ROOT / "tests" / "golden" / "calibration.txt"
    evaluated = run([bare / "quantcli", "eval-ppl", made, "--data", text], tmp_path, code=1)
    assert "pip install llama-cpp-python" in evaluated.stderr
    calibrated = run([bare / "quantcli", "calibrate", mini, "--data", text], tmp_path, code=1)
    assert "pip install torch transformers" in calibrated.stderr
