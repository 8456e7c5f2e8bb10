"""A wheel, installed where nothing else is, does a newcomer's first steps."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from support.pages import blocks, check_shown, steps

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


def test_a_newcomer(bare: Path, mini: Path, tmp_path: Path) -> None:
    """The tutorial's commands; those that need the extras say which libraries these are."""
    for module in ("torch", "transformers", "llama_cpp"):
        run([bare / "python", "-c", f"import {module}"], tmp_path, code=1)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    missing = {"eval-ppl": "pip install llama-cpp-python", "--method": "pip install torch"}
    told = set()
    for command, shown in chain(*map(steps, blocks("tutorial.md", "console"))):
        words: list[str | Path] = ["env", f"PATH={bare}:/usr/bin:/bin", "bash", "-c", command]
        needed = [each for each in missing if each in command]
        done = run(words, tmp_path, code=1 if needed else 0)
        if not needed:
            check_shown(shown, done.stderr + done.stdout)
        elif "better.gguf" not in command or "--method" in command:
            assert missing[needed[0]] in done.stderr
            told.add(needed[0])
    assert told == set(missing)
    named = [bare / "quantcli", "quantize", mini, "-q", "--recipe", "q4_k_m-head8", "-o", "8.gguf"]
    run(named, tmp_path)
    plain = tmp_path / "bookworm-mini-Q4_K_M.gguf"
    assert (tmp_path / "8.gguf").stat().st_size > plain.stat().st_size


def test_calibrate_names_what_is_not_installed(bare: Path, mini: Path, tmp_path: Path) -> None:
    text = ROOT / "tests" / "golden" / "calibration.txt"
    calibrated = run([bare / "quantcli", "calibrate", mini, "--data", text], tmp_path, code=1)
    assert "pip install torch transformers" in calibrated.stderr
