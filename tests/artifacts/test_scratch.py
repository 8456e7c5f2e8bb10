"""Arrays in files: zeros, room for all of them taken at once, a full disk said."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

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
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"a\.bin: the disk is full"):
        create_array(tmp_path / "a.bin", np.float32, (4, 4))
    assert list(tmp_path.iterdir()) == []
