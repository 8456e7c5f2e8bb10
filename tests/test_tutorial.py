"""The commands of the tutorial and of the how-to pages run, and print what is shown."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BIN = Path(sys.executable).parent
CALIBRATION = ROOT / "tests" / "golden" / "calibration.txt"
PROSE = ROOT / "tests" / "data" / "pride-and-prejudice.txt"

pytestmark = pytest.mark.slow


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


def steps(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block, and the lines that are shown below it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.replace("\\\n", " ").splitlines()
        yield lines[0], [line for line in lines[1:] if line not in ("...", "")]


def shell(command: str, folder: Path) -> str:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "100"}
    done = subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_the_tutorial(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    ran = 0
    for block in blocks("tutorial.md", "console"):
        for command, shown in steps(block):
            printed = shell(command, tmp_path)
            for line in shown:
                assert line in printed, command
            ran += 1
    assert ran > 6
    plain, better = (tmp_path / name for name in ("bookworm-mini-Q4_K_M.gguf", "better.gguf"))
    assert abs(plain.stat().st_size - better.stat().st_size) < 2048


@pytest.mark.parametrize("page", ["publish.md", "ci.md", "servers.md"])
def test_a_how_to(page: str, mini: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    # A copy: files are named after the folder itself, not after a link to it.
    shutil.copytree(mini, tmp_path / "model")
    for name, text in (("text", CALIBRATION), ("novel", PROSE), ("evaluation", PROSE)):
        (tmp_path / f"{name}.txt").symlink_to(text)
    for block in blocks(f"how-to/{page}", "sh"):
        runs_elsewhere = [line for line in block.splitlines() if line.startswith("vllm ")]
        shell(
            "\n".join(line for line in block.splitlines() if line not in runs_elsewhere), tmp_path
        )


def test_every_command_of_the_pages_is_one_of_ours() -> None:
    """Options that a page names exist: spelling errors in prose blocks do not stay."""
    options = set(re.findall(r"--[a-z][a-z0-9-]*", (DOCS / "reference.md").read_text()))
    options |= {"--help", "--json", "--quiet", "--verbose", "--debug", "--version"}
    for page in sorted(DOCS.rglob("*.md")):
        for block in re.findall(
            r"^ *```(?:sh|console)\n(.*?)^ *```", page.read_text(), re.M | re.S
        ):
            for line in block.replace("\\\n", " ").splitlines():
                if "quantcli " not in line:
                    continue
                named = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", line.split(" #")[0]))
                assert named <= options, f"{page.name}: {shlex.join(sorted(named - options))}"
