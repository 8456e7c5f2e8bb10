"""``quantcli calibrate`` as a process: results, refusals, interrupts and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantcli.cli.app import run

pytestmark = pytest.mark.slow

pytest.importorskip("torch")
pytest.importorskip("transformers")

TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"
SMALL = ["--data", str(TEXT), "--ctx", "64", "--chunks", "2", "--threads", "1"]


def _run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantcli", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """The same in this process, where torch is imported once for all tests."""
    code = run(args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_quiet_prints_the_path_alone(
    mini: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = _run(tmp_path, "-q", "calibrate", str(mini), *SMALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "bookworm-mini.calib.gguf\n", "")
    monkeypatch.chdir(tmp_path)
    shown = _call(capsys, "calibrate", "bookworm-mini.calib.gguf", "--stats", "--json")
    body = json.loads(shown[1])
    assert body["schema"] == "quantcli.calibration/1"
    assert body["chunks"] == 2
    assert {line["least"] for line in body["coverage"]} == {128}
    assert len(body["stats"]) == 4 * 7 + 1
    cosines = {line["tensor"]: line["cosine"] for line in body["stats"]}
    assert cosines["blk.0.attn_q.weight"] is None
    assert 0 < cosines["blk.1.attn_q.weight"] <= 1
    code, _, said = _call(capsys, "calibrate", str(mini), *SMALL)
    assert code == 1
    assert "exists already" in said


def test_quantize_calibrates_when_asked(
    mini: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "t.txt"
    text.write_text(TEXT.read_text()[:3500])
    monkeypatch.chdir(tmp_path)
    options = ["quantize", str(mini), "--type", "Q4_0"]
    code, result, said = _call(capsys, *options, "--calibrate", str(text), "--threads", "1")
    assert code == 0, said
    assert "calibrating" in said
    assert result == "bookworm-mini-Q4_0.gguf\n"
    made = "bookworm-mini-Q4_0.calib.gguf"
    assert _call(capsys, *options, "--imatrix", made, "-o", "same.gguf")[0] == 0
    whole = (tmp_path / "bookworm-mini-Q4_0.gguf").read_bytes()
    assert (tmp_path / "same.gguf").read_bytes() == whole


REFUSED = {
    "no model": ([], 2, "no MODEL is given"),
    "nothing there": (["nowhere"], 1, "nowhere"),
    "short": (["MINI", "--data", str(TEXT), "--ctx", "2048"], 1, "is too short"),
    "window": (["MINI", "--ctx", "8"], 2, "--ctx 8 is too short"),
    "long window": (["MINI", "--ctx", "100000"], 2, "tokens that the model takes"),
    "statistic": (["MINI", "--collect", "hesian"], 2, "no statistic 'hesian'"),
    "device": (["MINI", "--device", "tpu"], 2, "no device 'tpu'"),
    "dtype": (["MINI", "--dtype", "int8"], 2, "not computed in 'int8'"),
    "merge and run": (["MINI", "--merge", "a.gguf"], 2, "runs no model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence(
    name: str,
    mini: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args, code, said = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    found = _call(capsys, "calibrate", *[str(mini) if a == "MINI" else a for a in args])
    assert (found[0], found[1]) == (code, "")
    assert said in found[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate",),
        ("quantize", "--type", "Q4_K", "--method", "gptq", "--calibrate", str(TEXT)),
        ("quantize", "--bits", "4", "--quality", "high", "--calibrate", str(TEXT)),
        ("quantize", "--to", "awq", "--method", "awq", "--calibrate", str(TEXT)),
    ],
    ids=["calibrate", "gptq", "high", "awq"],
)
def test_without_torch_the_extra_is_named(
    arguments: tuple[str, ...], mini: Path, tmp_path: Path
) -> None:
    command, *options = arguments
    script = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'transformers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda n, p=None: None if n in ('torch', 'transformers') else real(n, p)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from quantcli.cli.app import run\n"
        f"sys.exit(run({[command, str(mini), *options]!r}))\n"
    )
    python = [sys.executable, "-c", script]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install torch transformers" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_keeps_the_checkpoint_and_says_how_to_go_on(
    mini: Path, tmp_path: Path
) -> None:
    long = ["calibrate", str(mini), "--data", str(TEXT), "--ctx", "64", "--threads", "1"]
    long += ["--chunks", "16"]
    whole = tmp_path / "whole"
    whole.mkdir()
    assert _run(whole, *long).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "quantcli", *long],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    state = tmp_path / ".bookworm-mini.calib.gguf.partial-run" / "state.json"
    limit = time.monotonic() + 120
    while not state.exists() and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "--resume continues" in said
    assert not (tmp_path / "bookworm-mini.calib.gguf").exists()
    resumed = _run(tmp_path, *long, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    name = "bookworm-mini.calib.gguf"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert not state.parent.exists()
