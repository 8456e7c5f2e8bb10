"""Arrays in files: zeros, room for all of them taken at once, a full disk said."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from quantcli.artifacts import space
from quantcli.artifacts.scratch import create_array
from quantcli.errors import OutputError


def test_it_is_zero_and_holds_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"\xff" * 100)
    array = create_array(path, np.float64, (3, 5))
    assert not array.any()
    array[1] = 2
    array.flush()
    assert np.fromfile(path).reshape(3, 5)[1].tolist() == [2] * 5
    # No page is left to be found when it is written, which may be too late.
    assert path.stat().st_blocks * 512 >= path.stat().st_size == 120


def test_a_full_disk_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_allocate", lambda *_: errno.ENOSPC)
    with pytest.raises(OutputError, match=r"a\.bin: the disk is full"):
        create_array(tmp_path / "a.bin", np.float32, (4, 4))
    assert list(tmp_path.iterdir()) == []


def test_where_no_space_can_be_reserved_zeros_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole in the file would be found only by a signal."""
    monkeypatch.setattr(space, "_allocate", lambda *_: errno.EOPNOTSUPP)
    create_array(tmp_path / "a.bin", np.uint8, (3, 1 << 20))
    found = (tmp_path / "a.bin").stat()
    assert found.st_blocks * 512 >= found.st_size == 3 << 20
