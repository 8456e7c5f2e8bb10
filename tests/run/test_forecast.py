"""What a dry run says of memory, scratch disk and time, against what the run takes."""

from __future__ import annotations

import json
import os
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

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
pytest.importorskip("torch")

WITHIN = 0.15
CASES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "method": "gptq", "fisher_windows": 4},
    "without gradients": {"bits": 4, "method": "gptq", "fisher_windows": 0},
    "awq": {"bits": 4, "method": "awq"},
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
