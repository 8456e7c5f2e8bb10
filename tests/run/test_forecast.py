"""What a dry run says of memory, scratch disk and time, against what the run takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import quantcli
from quantcli.cli.app import run
from quantcli.errors import OutputError, PlanError
from quantcli.run import check_needs, forecast
from quantcli.types import Event, Progress

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
pytest.importorskip("torch")

WITHIN = 0.15
CASES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "method": "gptq", "fisher_windows": 4},
    "without gradients": {"bits": 4, "method": "gptq", "fisher_windows": 0},
    "awq": {"bits": 4, "method": "awq"},
    "decoded": {"to": "hf", "type": "Q4_0", "method": "awq"},
    "folder": {"to": "gptq", "method": "gptq", "fisher_windows": 4},
}


def _scratch(folder: Path) -> int:
    """Bytes of files in folders of runs."""
    found = 0
    for place, _, names in os.walk(folder):
        if ".partial-run" in place or ".statistics" in place:
            for name in names:
                try:
                    found += (Path(place) / name).stat().st_size
                except FileNotFoundError:
                    continue
    return found


@contextmanager
def _watched(folder: Path) -> Iterator[tuple[list[int], Callable[..., None]]]:
    """The most scratch that lay in the folder, by looking all the time and when one is told to."""
    seen, over = [0], threading.Event()

    def once(*_: object) -> None:
        seen[0] = max(seen[0], _scratch(folder))

    def look() -> None:
        while not over.wait(0.002):
            once()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen, once
    finally:
        over.set()
        thread.join()


def _peak(process: subprocess.Popen[str]) -> int:
    """The most resident memory of a process, by asking for it all the time until it ends."""
    most = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                most = max(most, 1024 * int(line.split()[1]))
        time.sleep(0.01)
    return most


@pytest.mark.parametrize("name", CASES)
def test_scratch_disk_is_what_was_said(name: str, tmp_path: Path) -> None:
    output, wish = tmp_path / "out", {"chunks": 4, "threads": 1, **CASES[name]}
    said = quantcli.quantize(MINI, output, dry_run=True, **wish).document
    assert not list(tmp_path.iterdir())
    with _watched(tmp_path) as (seen, once):
        quantcli.quantize(MINI, output, on_event=once, **wish)
    assert seen[0] > 10**6
    assert abs(said["scratch_bytes"] / seen[0] - 1) < WITHIN
    assert said["estimated_seconds"] > 0


def test_rounding_to_nearest_needs_no_scratch(tmp_path: Path) -> None:
    said = quantcli.quantize(MINI, tmp_path / "a.gguf", bits=4, dry_run=True).document
    assert said["scratch_bytes"] == 0
    assert said["estimated_seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("wish", [["--bits", "4"], ["--bits", "4", "--method", "gptq"]])
def test_memory_is_what_was_said(wish: list[str], tmp_path: Path) -> None:
    """Of a process of its own, as the kernel counts its resident pages."""
    command = [sys.executable, "-m", "quantcli", "quantize", str(MINI), *wish, "--threads", "2"]
    if "--method" in wish:
        command += ["--chunks", "4"]
    command += ["-o", str(tmp_path / "a.gguf")]
    planned = subprocess.run(
        [*command, "--dry-run", "--json"], check=True, capture_output=True, text=True
    )
    said = json.loads(planned.stdout)
    with subprocess.Popen([*command, "-q"], stdout=subprocess.DEVNULL, text=True) as process:
        peak = _peak(process)
    assert process.returncode == 0
    assert abs(said["peak_memory_bytes"] / peak - 1) < WITHIN


def _wish(**more: Any) -> dict[str, Any]:
    return {"bits": 4, "method": "gptq", "fisher_windows": 0, "chunks": 4, "threads": 1, **more}


def test_a_limit_that_nothing_fits_is_refused_with_the_smallest_that_does(tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    # The lower one is too little for writing alone, and what is named is for all of the run.
    for allowed in ("200", "100"):
        said = rf"bytes of memory at its .* {allowed},000,000 allowed"
        with pytest.raises(PlanError, match=said) as caught:
            quantcli.quantize(MINI, output, max_memory=f"{allowed}M", **_wish())
        hint = str(caught.value.hint)
        assert re.fullmatch(r"--max-memory \d+M is the least that is enough", hint)
    with pytest.raises(PlanError, match=r"scratch disk, more than the 1,000,000") as caught:
        quantcli.quantize(MINI, output, max_scratch="1M", **_wish())
    assert not list(tmp_path.iterdir())
    found = re.match(r"--max-scratch (\d+M)", str(caught.value.hint))
    assert found is not None
    quantcli.quantize(MINI, output, max_scratch=found[1], dry_run=True, **_wish())


def test_hidden_states_leave_memory_before_a_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between what the two ways take a limit is kept, and said to be."""
    monkeypatch.setattr(forecast, "resident_memory", lambda: 300 << 20)
    said = quantcli.quantize(MINI, tmp_path / "a.gguf", dry_run=True, **_wish(chunks=40)).document
    states = 57 * 512 * 256 * 2
    limit = said["peak_memory_bytes"] - states // 2
    other = quantcli.quantize(
        MINI, tmp_path / "a.gguf", dry_run=True, max_memory=limit, **_wish(chunks=40)
    ).document
    assert other["peak_memory_bytes"] <= limit


def test_scratch_lies_where_one_says_and_resume_finds_it_there(tmp_path: Path) -> None:
    scratch, output = tmp_path / "scratch", tmp_path / "out" / "a.gguf"
    scratch.mkdir()
    output.parent.mkdir()
    seen: set[str] = set()

    def stop(event: Event) -> None:
        seen.update(path.name for path in output.parent.iterdir())
        if isinstance(event, Progress) and event.what == "layer 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantcli.quantize(MINI, output, scratch=scratch, on_event=stop, **_wish())
    # What is rounded fills the output itself, which scratch is not.
    assert seen == {".a.gguf.partial-output"}
    (left,) = scratch.iterdir()
    assert left.name.startswith(".a.gguf-")
    assert (left / "state.json").is_file()
    notes: list[str] = []
    made = quantcli.quantize(
        MINI, output, scratch=scratch, resume=True,
        on_event=lambda event: notes.append(getattr(event, "message", "")), **_wish(),
    )  # fmt: skip
    assert "continuing after layer 1" in notes
    assert not list(scratch.iterdir())
    other = quantcli.quantize(MINI, tmp_path / "b.gguf", **_wish())
    assert made.paths[0].read_bytes() == other.paths[0].read_bytes()


def test_a_scratch_folder_that_takes_no_files_is_refused(tmp_path: Path) -> None:
    output, file = tmp_path / "a.gguf", tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match=r"--scratch .*nowhere does not exist"):
        quantcli.quantize(MINI, output, scratch=tmp_path / "nowhere", **_wish())
    with pytest.raises(OutputError, match=r"--scratch .*file is no folder"):
        quantcli.quantize(MINI, output, scratch=file, **_wish())
    if os.geteuid() != 0:
        file.unlink()
        file.mkdir(0o500)
        with pytest.raises(OutputError, match="cannot be written to"):
            quantcli.quantize(MINI, output, scratch=file, **_wish())
    assert not output.exists()


def test_room_is_counted_for_scratch_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = quantcli.quantize(MINI, tmp_path / "a.gguf", dry_run=True, **_wish()).document
    room = said["bytes"] + 10**6
    assert said["scratch_bytes"] > room
    monkeypatch.setattr(check_needs, "free_disk", lambda _: room)
    with pytest.raises(OutputError, match=r"not enough disk .* of scratch files needed"):
        quantcli.quantize(MINI, tmp_path / "a.gguf", **_wish())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_smallest_limit_that_is_named_is_kept(tmp_path: Path) -> None:
    """What the refusal names is enough, and the run stays below it."""
    command = [sys.executable, "-m", "quantcli", "quantize", str(MINI), "--bits", "4"]
    command += ["--method", "gptq", "--fisher-windows", "0", "--chunks", "4", "--threads", "1"]
    command += ["-o", str(tmp_path / "a.gguf"), "-q"]
    refused = subprocess.run(
        [*command, "--max-memory", "200M"], capture_output=True, text=True, check=False
    )
    named = re.search(r"--max-memory (\d+)M is the least", refused.stderr)
    assert refused.returncode
    assert named is not None
    assert not list(tmp_path.iterdir())
    # A process is not always as large when it begins.
    limit = int(named[1]) + 10
    with subprocess.Popen(
        [*command, "--max-memory", f"{limit}M"], stdout=subprocess.DEVNULL, text=True
    ) as process:
        peak = _peak(process)
    assert process.returncode == 0
    assert peak <= limit * 10**6


def test_a_calibration_is_planned_and_kept_within_its_limit(tmp_path: Path) -> None:
    output = tmp_path / "m.calib.gguf"
    wish: dict[str, Any] = {"chunks": 4, "ctx": 64, "collect": "hessian", "threads": 1}
    said = quantcli.calibrate(MINI, output=output, dry_run=True, **wish)
    assert said.calibration is None
    assert not list(tmp_path.iterdir())
    with _watched(tmp_path) as (seen, once):
        quantcli.calibrate(MINI, output=output, on_event=once, **wish)
    assert abs(said.document["scratch_bytes"] / seen[0] - 1) < WITHIN
    output.unlink()
    with pytest.raises(PlanError, match=r"scratch disk, more than the 1,000,000 allowed"):
        quantcli.calibrate(MINI, output=output, max_scratch="1M", force=True, **wish)
    assert [path.name for path in tmp_path.iterdir()] == ["m.calib.stats.safetensors"]


def test_the_command_prints_a_calibration_s_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MINI.parents[1] / "golden" / "calibration.txt"
    given = ["calibrate", str(MINI), "-d", str(text), "--chunks", "4", "--ctx", "64"]
    given += ["-o", str(tmp_path / "m.gguf")]
    assert run([*given, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "quantcli.calibration-plan/1"
    assert found["chunks"] == 4
    assert run([*given, "--dry-run"]) == 0
    assert "scratch disk" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
