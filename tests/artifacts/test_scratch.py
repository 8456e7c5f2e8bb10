"""Arrays in files: zeros, room for all of them taken at once, a full disk said."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from quantcli.artifacts import space
from quantcli.artifacts.scratch import ArrayFile, create_array
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


def test_parts_of_a_file_are_read_and_written_by_their_indices(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    array = ArrayFile.create(path, np.float32, (3, 2, 5))
    assert path.stat().st_size == 3 * 2 * 5 * 4
    assert not array[()].any()
    array[1, 0] = np.arange(5)
    array[2,] = np.full((2, 5), 7)
    array.flush()
    whole = np.fromfile(path, np.float32).reshape(3, 2, 5)
    assert whole[1, 0].tolist() == [0, 1, 2, 3, 4]
    assert (whole[2] == 7).all()
    assert np.array_equal(array[2, 1], whole[2, 1])
    again = ArrayFile.open(path, np.float32, (3, 2, 5))
    assert np.array_equal(again[1,], whole[1])
    with pytest.raises(OutputError, match=r"a\.bin"):
        again[0, 0] = np.zeros(5)
    path.write_bytes(b"")
    with pytest.raises(OutputError, match="cut short"):
        array[0,]


def test_a_file_that_has_no_room_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_allocate", lambda *_: errno.ENOSPC)
    with pytest.raises(OutputError, match=r"a\.bin: the disk is full"):
        ArrayFile.create(tmp_path / "a.bin", np.float32, (4, 4))
    assert list(tmp_path.iterdir()) == []
