"""Files appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantcli.artifacts import atomic, space
from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.staging import partial_path
from quantcli.errors import OutputError


def test_publishes_all_files_with_their_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.bin", tmp_path / "b.bin"
    with AtomicFiles({a: 6, b: 3}) as files:
        files.write(a, 3, b"def")
        files.write(b, 0, b"xyz")
        files.write(a, 0, b"abc")
        assert not a.exists()
        files.publish()
    assert a.read_bytes() == b"abcdef"
    assert b.read_bytes() == b"xyz"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "b.bin"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), AtomicFiles({target: 3}, force=True) as files:
        files.write(target, 0, b"new")
        raise error
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_existing_file_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with (
        pytest.raises(OutputError, match=r"a\.bin exists already.*--force"),
        AtomicFiles({target: 3}),
    ):
        pass
    assert target.read_bytes() == b"old"


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="nowhere does not exist"),
        AtomicFiles({tmp_path / "nowhere" / "a.bin": 3}),
    ):
        pass


def test_second_writer_of_the_same_file_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with AtomicFiles({target: 3}) as first:
        with pytest.raises(OutputError, match="another run is writing"), AtomicFiles({target: 3}):
            pass
        first.write(target, 0, b"abc")
        first.publish()
    assert target.read_bytes() == b"abc"


def test_full_disk_is_said_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_allocate", lambda *_: errno.ENOSPC)
    with pytest.raises(OutputError, match="disk is full"), AtomicFiles({tmp_path / "a.bin": 3}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_was_lost_on_the_way_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of it at the next flush alone, here the one while data still come."""
    lost = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def flush(_: int) -> None:
        if lost:
            raise lost.pop()

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(atomic, "_FLUSH_BYTES", 2)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        AtomicFiles({tmp_path / "a.bin": 3}) as files,
    ):
        files.write(tmp_path / "a.bin", 0, b"abc")
        files.publish()
    assert not lost
    assert list(tmp_path.iterdir()) == []


_WRITE_FOR_EVER = """
import sys, time
from pathlib import Path
from quantcli.artifacts.atomic import AtomicFiles
target = Path(sys.argv[1])
with AtomicFiles({target: 1 << 20}, force=True) as files:
    print("writing", flush=True)
    while True:
        files.write(target, 0, b"x" * (1 << 20))
        time.sleep(0.001)
"""


def test_killed_writer_leaves_the_old_file_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with subprocess.Popen(
        [sys.executable, "-c", _WRITE_FOR_EVER, str(target)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert target.read_bytes() == b"old"
    assert partial_path(target).exists()
    with AtomicFiles({target: 3}, force=True) as files:
        files.write(target, 0, b"new")
        files.publish()
    assert target.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
