"""Pipes, full disks and signals: what a shell script relies on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from support.process import command, environment, run


def _shell(script: str, folder, **names: str) -> subprocess.CompletedProcess[str]:
    program = " ".join(f"'{part}'" for part in command(folder))
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; q() {{ {program} \"$@\"; }}; {script}"],
        capture_output=True, text=True, env=environment(**names), timeout=60, check=False,
    )  # fmt: skip


def test_a_reader_that_leaves_is_no_failure(tmp_path):
    done = _shell("q lines 20000 | head -n 1", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("line 0 ")


def test_a_reader_that_never_reads_is_no_failure(tmp_path):
    done = _shell("q lines 20000 | true", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_of_the_help_may_leave():
    done = _shell("q --help | head -n 1", None)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_window_of_the_progress_may_close(tmp_path):
    done = _shell("q work 2>&1 >/dev/null | true", tmp_path)
    assert done.returncode == 0


def test_all_lines_arrive_when_all_are_read(tmp_path):
    done = _shell("q lines 20000 | wc -l", tmp_path)
    assert done.stdout.strip() == "20000"


def test_a_full_disk_is_an_error(tmp_path):
    done = _shell("q lines 5 > /dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "error: standard output: no space left on device\n"
        "hint: free some space or choose another disk\n"
    )


def test_a_closed_output_does_not_hide_the_exit_code(tmp_path):
    assert _shell("q fail source >&-", tmp_path).returncode == 1


def test_a_name_that_the_encoding_lacks_is_escaped(tmp_path):
    model = tmp_path / "modèle"
    done = run("inspect", model, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 1
    assert "mod\\xe8le: there is no such file" in done.stderr


SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}


def _waiting(tmp_path, *arguments: str, until: str = "temporary") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*command(tmp_path), *(arguments or ("wait", str(tmp_path), "30"))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (tmp_path / until).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("name", SIGNALS)
def test_a_polite_stop_cleans_up_and_ends_with_130(name, tmp_path):
    process = _waiting(tmp_path)
    process.send_signal(SIGNALS[name])
    _, talk = process.communicate(timeout=30)
    assert (process.returncode, talk) == (130, "error: interrupted\n")
    assert (tmp_path / "cleaned").exists()
    assert not (tmp_path / "temporary").exists()


def test_a_second_kill_does_not_break_the_cleaning(tmp_path):
    process = _waiting(tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_stop_that_is_dropped_on_the_way_is_made_again(name, tmp_path):
    """The signal falls into a callback whose errors Python drops, as in the import system."""
    process = _waiting(tmp_path, "lose", str(tmp_path), until="dropping")
    process.send_signal(SIGNALS[name])
    _, talk = process.communicate(timeout=15)
    assert process.returncode == 130
    assert talk.endswith("\nerror: interrupted\n")
    assert (tmp_path / "cleaned").exists()


def test_a_download_that_hears_nothing_is_left(tmp_path):
    process = _waiting(tmp_path, "download", str(tmp_path))
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=15)
    assert (process.returncode, talk) == (130, "error: interrupted\n")


_EARLY = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from quantcli.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["quantcli.cli.app", "typer", "quantcli.errors"])
def test_an_interrupt_while_modules_load_is_no_traceback(module):
    done = subprocess.run(
        [sys.executable, "-c", _EARLY, module],
        capture_output=True, text=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_nohup_is_respected(tmp_path):
    done = _shell(
        "trap '' HUP; q wait \"$PLACE\" 1 & pid=$!; "
        'while [ ! -e "$PLACE/temporary" ]; do sleep 0.05; done; kill -HUP $pid; wait $pid',
        tmp_path,
        PLACE=str(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")
