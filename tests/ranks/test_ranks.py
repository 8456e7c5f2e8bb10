"""Ranks that run together, as torchrun starts them: they wait for each other, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from quantcli.cli.app import run
from quantcli.errors import UsageError
from quantcli.ranks.share import Share, read_share
from quantcli.ranks.slab_sums import Recorder, SlabRecord

COMMAND = ("quantize", "--threads", "1", "--type", "Q4_K_M")


def _start(
    rank: int, count: int, mini: Path, out: Path, *more: str, timeout: float = 60
) -> subprocess.Popen[str]:
    ranked = {"RANK": str(rank), "WORLD_SIZE": str(count), "QUANTCLI_RANK_TIMEOUT": str(timeout)}
    return subprocess.Popen(
        [sys.executable, "-m", "quantcli", *COMMAND, str(mini), "-o", str(out), *more],
        env=os.environ | ranked, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _end(*ranks: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    ended = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        ended.append((process.returncode, out, err))
    return ended


def _whole(mini: Path, folder: Path) -> bytes:
    path = folder / "whole.gguf"
    assert run([*COMMAND, str(mini), "-o", str(path)]) == 0
    return path.read_bytes()


def test_ranks_give_the_bytes_of_one_process_and_the_first_tells(
    mini: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    first, second = _end(_start(0, 2, mini, out), _start(1, 2, mini, out))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert first[1] == f"{out}\n"
    assert second[1:] == ("", "")
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]
    assert out.read_bytes() == _whole(mini, tmp_path)


def test_a_rank_that_is_killed_is_started_again_alone(mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    first = _start(0, 2, mini, out)
    second = _start(1, 2, mini, out)
    meeting = out.parent / ".m.gguf.partial" / "shared-meeting"
    while second.poll() is None and not any(meeting.glob("slabs-1-*")):
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    _end(second)
    # Where it was done before the signal came, the output is there, else the first waits.
    if first.poll() is None and not out.exists():
        _end(_start(1, 2, mini, out))
    assert _end(first)[0][0] == 0
    assert out.read_bytes() == _whole(mini, tmp_path)


def test_ranks_that_disagree_end_with_one_sentence(mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    ended = _end(_start(0, 2, mini, out), _start(1, 2, mini, out, "--pure"))
    said = "".join(err for _, _, err in ended)
    assert all(code in (1, 2) for code, _, _ in ended), ended
    assert said.count("differ in their recipe") >= 1
    assert said.count("error: ") == 2
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_is_not_shared_is_told(mini: Path, tmp_path: Path) -> None:
    outs = [tmp_path / str(rank) / "m.gguf" for rank in range(2)]
    for out in outs:
        out.parent.mkdir()
    ended = _end(*(_start(rank, 2, mini, out, timeout=3) for rank, out in enumerate(outs)))
    for rank, (code, _, said) in enumerate(ended):
        assert code == 1
        assert f"rank {rank} has waited 3 s for rank {1 - rank} of 2 in" in said
        assert list(outs[rank].parent.iterdir()) == []


def test_a_rank_that_fails_ends_the_others(mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    first = _start(0, 2, mini, out)
    meeting = out.parent / ".m.gguf.partial" / "shared-meeting"
    while not any(meeting.glob("rank-0.json")):
        time.sleep(0.01)
    # As a rank leaves it whose disk is full.
    (meeting / "failed-1").write_text("the disk is full")
    ((code, _, said),) = _end(first)
    assert code == 1
    assert "rank 0 ends, since rank 1 has failed" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Share(3, 4, together=True)),
    ],
)
def test_the_share_is_read_from_the_environment(
    environment: dict[str, str], share: Share | None
) -> None:
    assert read_share("env", environment) == share
    assert read_share("2/4", {}) == Share(1, 4)
    assert read_share(None, {"RANK": "3", "WORLD_SIZE": "4"}) is None


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 is outside of its range"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is outside of its range"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK=x is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "-4"}, "WORLD_SIZE=-4 is not a number"),
    ],
)
def test_a_wrong_environment_is_refused(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read_share("env", environment)
    with pytest.raises(UsageError):
        read_share("1/2", {"RANK": "1", "WORLD_SIZE": "4"})


def test_work_is_divided_evenly_and_in_order() -> None:
    sizes = [4] * 40 + [1, 100, 1, 1] + [4] * 20
    owners = Share(0, 3).divide(sizes)
    taken = [sum(s for s, owner in zip(sizes, owners, strict=True) if owner == i) for i in range(3)]
    assert sum(taken) == sum(sizes)
    assert max(taken) - min(taken) <= 100
    assert owners[:6] == [0, 1, 2, 0, 1, 2]


def _record(chunks: Sequence[tuple[str, int, bytes]]) -> SlabRecord:
    recorder = Recorder()
    for chunk in chunks:
        recorder.add(*chunk)
    return SlabRecord(0, b"", b"", recorder.sum.digest(), tuple(recorder.runs))


@pytest.mark.parametrize("length", [1, 7, 64, 8191, 8192, 8200, 100_000])
def test_a_record_sees_any_byte_that_is_not_as_it_was_left(length: int) -> None:
    pieces = [bytes((7 * i + j) % 251 for j in range(length)) for i in range(3)]
    step = length + 5
    file = bytearray(3 * step)
    for index, piece in enumerate(pieces):
        file[index * step : index * step + length] = piece
    record = _record([("f", index * step, piece) for index, piece in enumerate(pieces)])
    assert record.runs == (("f", 0, length, step, 3),)

    def read(name: str, offset: int, size: int) -> bytes:
        return bytes(file[offset : offset + size])

    assert record.holds(read)
    for place in {0, length - 1, step, step + length // 2, 2 * step + length - 1}:
        file[place] ^= 0x10
        assert not record.holds(read)
        file[place] ^= 0x10
    # Two equal parts that have changed places, and an end that was cut off.
    assert not _record([("f", 0, pieces[1]), ("f", step, pieces[0])]).holds(read)
    del file[-6:]
    assert not record.holds(read)
