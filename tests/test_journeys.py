"""Three journeys by the very commands of the pages: a newcomer's, a publisher's, a CI engineer's.

What the pages show must be printed; the publisher's set arrives at a Hub of our own, and the page
about it opens in a browser.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.browser import CHROMIUM, open_page
from support.fake_hub import Hub, serve
from support.forks import Forks
from support.json_schemas import check_document
from support.pages import DOCS, blocks, check_shown, steps

ROOT = Path(__file__).parents[1]
CALIBRATION = ROOT / "tests" / "golden" / "calibration.txt"
PROSE = ROOT / "tests" / "data" / "pride-and-prejudice.txt"
TOKEN = "hf_abcdefghijklmnop"

pytestmark = pytest.mark.slow

Shell = Callable[..., str]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve({}) as running:
        yield running


@pytest.fixture(scope="module")
def shell(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """``shell(script, folder, code=0)``: what a script of a page prints, standard error first."""
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    ours = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "COLUMNS": "100",
    }  # fmt: skip
    with Forks(tmp_path_factory.mktemp("forks"), ours) as forks:
        env = os.environ | ours | {"PATH": f"{forks.bin}:{os.environ['PATH']}"}

        def run(script: str, folder: Path, *, code: int = 0) -> str:
            done = subprocess.run(
                ["bash", "-e", "-c", script],
                cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False,
            )  # fmt: skip
            assert done.returncode == code, f"{script}\n{done.stdout}{done.stderr}"
            return done.stderr + done.stdout

        yield run


@pytest.fixture
def place(mini: Path, tmp_path: Path) -> Path:
    """A folder with what the how-to pages take for granted: a model and texts."""
    # A copy: files are named after the folder itself, not after a link to it.
    shutil.copytree(mini, tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(CALIBRATION.read_bytes()[:16_000])
    for name in ("novel", "evaluation"):
        (tmp_path / f"{name}.txt").write_bytes(PROSE.read_bytes()[:8_000])
    return tmp_path


def test_a_newcomer(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    ran = 0
    for block in blocks("tutorial.md", "console"):
        for command, shown in steps(block):
            check_shown(shown, shell(command, tmp_path))
            ran += 1
    assert ran > 6
    plain, better = (tmp_path / name for name in ("bookworm-mini-Q4_K_M.gguf", "better.gguf"))
    assert abs(plain.stat().st_size - better.stat().st_size) < 2048


def test_a_publisher(shell: Shell, hub: Hub, place: Path) -> None:
    made, measured, planned = blocks("how-to/publish.md", "sh")
    shell(made + measured, place)
    said = shell(planned, place)
    assert hub.created == {}
    sent = set(re.findall(r"^\S+\.(?:gguf|md|html)\b", said, re.MULTILINE))
    # The same command without --dry-run, as the page says.
    printed = shell(planned.replace(" --dry-run", ""), place)
    (repo,) = hub.created
    assert hub.created[repo], "private until told otherwise"
    assert f"{hub.url}/{repo}" in printed
    files = {path.name: path.read_bytes() for path in (place / "set").iterdir() if path.is_file()}
    assert hub.repos[repo] == files
    assert sent == set(files)
    assert {"README.md", "report.html"} < set(files)
    assert sum(name.endswith(".gguf") for name in files) == 5
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in printed + said
    # A single file goes there as it is made.
    printed = shell(f"quantcli quantize ./model --type Q8_0 --push {repo}-one", place)
    assert hub.created[f"{repo}-one"]
    one = hub.repos[f"{repo}-one"]
    assert isinstance(one, dict)
    assert one["model-Q8_0.gguf"] == (place / "model-Q8_0.gguf").read_bytes()
    if CHROMIUM is not None:
        root, said = open_page(place / "set" / "report.html", place)
        assert "CONSOLE" not in said
        assert all(name in root for name in files if re.search(r"-Q\d.*gguf$", name))


def test_a_ci_engineer(shell: Shell, place: Path) -> None:
    (script,) = blocks("how-to/ci.md", "sh")
    shell(script, place)
    document = json.loads((place / "quality.json").read_text())
    check_document("eval-ppl", 1, document)
    assert all(gate["passed"] for gate in document["gates"])
    # The table of exit codes, and errors as JSON.
    gate = script.splitlines()[-2:]
    shell(f"f=model-Q4_K_M.gguf\n{chr(10).join(gate)}".replace("0.03", "0.0001"), place, code=3)
    document = json.loads((place / "quality.json").read_text())
    assert [gate["passed"] for gate in document["gates"]] == [False, True]
    for words, code in {"quantize ./nothing": 1, "quantize ./model --bits 7": 2}.items():
        shell(f"quantcli {words} --json > error.json", place, code=code)
        document = json.loads((place / "error.json").read_text())
        check_document("error", 1, document)
        assert document["exit_code"] == code


def test_servers(shell: Shell, place: Path) -> None:
    for block in blocks("how-to/servers.md", "sh"):
        shell("".join(f"{line}\n" for line in block.splitlines() if "vllm" not in line), place)
    for name in ("model-FP8", "model-W4A16"):
        assert (place / name / "config.json").is_file()


@pytest.mark.parametrize("page", ["tour.md", "sets.md"])
def test_what_a_page_shows(page: str, shell: Shell, place: Path) -> None:
    """Of the commands that need nothing but the model of this repository."""
    (place / "tests").symlink_to(ROOT / "tests")
    (place / "novel.txt").write_bytes(PROSE.read_bytes())
    for name in ("BF16", "Q8_0", "Q4_K_M"):
        made = f"mini-{name.lower()}.gguf"
        shell(f"quantcli quantize tests/data/bookworm-mini --type {name} -q -o {made}", place)
    checked = 0
    for block in (*blocks(page, ""), *blocks(page, "console")):
        for command, shown in steps(block):
            if shown and re.search(r"bookworm-mini|mini-", command):
                again = "" if re.search(r"inspect|eval-ppl|--dry-run", command) else " --force"
                check_shown(shown, shell(command + again, place))
                checked += 1
    assert checked


def test_a_page_that_shows_something_else_is_caught() -> None:
    printed = "model        size\na.gguf    2.89 MB\n8 MB became 2.89 MB in 0.3 s\n"
    check_shown(["model  size", "a.gguf  2.90 MB", "8 MB became 2.89 MB in 7.5 s"], printed)
    for wrong in (["a.gguf  3.89 MB"], ["b.gguf  2.89 MB"], ["a.gguf  2.89 MB", "model  size"]):
        with pytest.raises(AssertionError, match="is shown"):
            check_shown(wrong, printed)


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
