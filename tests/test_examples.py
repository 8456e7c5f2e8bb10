"""The workflows of examples/ do what they say when their steps run here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TEXT = ROOT / "tests" / "data" / "pride-and-prejudice.txt"


def load(name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load((ROOT / "examples" / name).read_text())
    return found


def inputs_of(workflow: dict[Any, Any]) -> dict[str, Any]:
    # YAML 1.1 reads the key "on" as true.
    found: dict[str, Any] = workflow[True]["workflow_call"]["inputs"]
    return found


def run_steps(folder: Path, given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the job's shell steps but the installation, as GitHub's runner does: bash -e, in turn."""
    workflow = load("quantize.yml")
    values = {name: each.get("default", "") for name, each in inputs_of(workflow).items()} | given
    done = None
    for step in workflow["jobs"]["quantize"]["steps"]:
        if "run" not in step or step["name"] == "Install":
            continue
        environment = {
            name: re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda hit: values[hit[1]], value)
            for name, value in step["env"].items()
        }
        path = f"{BIN}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
            cwd=folder, env=os.environ | environment | {"PATH": path},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        if done.returncode:
            break
    assert done is not None
    return done


def test_the_call_gives_what_the_workflow_takes() -> None:
    taken = inputs_of(load("quantize.yml"))
    for job in load("github-actions.yml")["jobs"].values():
        assert job["uses"].endswith("/quantize.yml")
        assert set(job["with"]) <= set(taken)
        assert {name for name, each in taken.items() if each.get("required")} <= set(job["with"])


@pytest.mark.slow
def test_the_workflow_quantizes_and_measures(mini: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    given = {"model": str(mini), "text": str(TEXT), "chunks": "2"}
    done = run_steps(tmp_path, given)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "quality.json").read_text())["results"]
    assert result["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert 0 < result["kld"]["value"] < 0.05


@pytest.mark.slow
def test_the_workflow_fails_above_its_limit(mini: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    given = {"model": str(mini), "text": str(TEXT), "chunks": "2", "max-kld": "0.000001"}
    assert run_steps(tmp_path, given).returncode == 3
