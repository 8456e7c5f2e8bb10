"""Importance matrices in both forms give the floats that llama-quantize computes.

The expected values are formed one float32 at a time, as the C loop does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from struct import pack
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from support.broken import legacy, legacy_entry

from quantcli.sources.imatrix import is_legacy_importance, read_importance

Q, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
RNG = np.random.default_rng(5)


def write(
    path: Path,
    entries: dict[str, tuple[NDArray[Any], Sequence[float]]],
    datasets: Sequence[str] = ("wiki.txt", "code.txt"),
) -> Path:
    """An importance matrix as llama.cpp's imatrix tool writes it."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", 11)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in sorted(entries.items()):
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one_by_one(sums: NDArray[Any], counts: Sequence[int]) -> NDArray[np.float32]:
    """Each sum divided by its row's whole count in float32; ones where nothing was counted."""
    rows = np.asarray(sums, np.float32).reshape(len(counts), -1)
    return np.array(
        [
            [value / np.float32(count) if count > 0 else np.float32(1) for value in row]
            for row, count in zip(rows, counts, strict=True)
        ],
        np.float32,
    )


def test_gguf_form(tmp_path: Path) -> None:
    dense = RNG.chisquare(1, (1, 96)) * 1e5
    stack = RNG.chisquare(1, (4, 32)) * 1e3
    path = write(tmp_path / "i.gguf", {Q: (dense, [5632]), EXPERTS: (stack, [700, 0, 3, 16777216])})
    found = read_importance(path)
    assert (found.path, found.chunks, found.datasets) == (path, 11, ("wiki.txt", "code.txt"))
    assert set(found.entries) == {Q, EXPERTS}
    assert found.entries[Q].tobytes() == one_by_one(dense, [5632]).tobytes()
    expected = one_by_one(stack, [700, 0, 3, 16777216])
    assert found.entries[EXPERTS].tobytes() == expected.tobytes()
    assert (found.entries[EXPERTS][1] == 1).all()


@pytest.mark.parametrize(
    ("stored", "meant"), [(0.4, 0), (0.5, 1), (1.5, 2), (2.5, 3), (6.499, 6), (7.0, 7)]
)
def test_counts_are_rounded_half_away_from_zero(stored: float, meant: int, tmp_path: Path) -> None:
    sums = np.array([[3.0, 7.0]])
    found = read_importance(write(tmp_path / "i.gguf", {Q: (sums, [stored])}))
    assert found.entries[Q].tobytes() == one_by_one(sums, [meant]).tobytes()


def test_other_tensors_are_left_alone(tmp_path: Path) -> None:
    """Newer tools may add statistics; llama-quantize does not look at them either."""
    path = tmp_path / "i.gguf"
    sums = np.ones((1, 4))
    write(path, {Q: (sums, [1]), "blk.1.x": (sums, [1])})
    content = path.read_bytes().replace(b"blk.1.x.in_sum2", b"blk.1.x.statist")
    path.write_bytes(content.replace(b"blk.1.x.counts", b"blk.1.x.others"))
    assert set(read_importance(path).entries) == {Q}


@pytest.mark.parametrize("calls", [1, 3, 77, 0, -2])
def test_legacy_form(calls: int, tmp_path: Path) -> None:
    values = [float(np.float32(v)) for v in RNG.chisquare(1, 40) * 1e4]
    path = tmp_path / "imatrix.dat"
    tail = pack("<ii", 11, 8) + b"wiki.txt"
    path.write_bytes(legacy(legacy_entry(Q.encode(), values, calls), tail=tail))
    found = read_importance(path)
    expected = [v / np.float32(calls) if calls > 0 else v for v in np.array(values, np.float32)]
    assert found.entries[Q].shape == (1, 40)
    assert found.entries[Q].tobytes() == np.array(expected, np.float32).tobytes()
    assert (found.chunks, found.datasets) == (11, ("wiki.txt",))


@pytest.mark.parametrize(
    ("tail", "chunks", "datasets"),
    [
        (b"", 0, ()),
        (pack("<i", 9), 9, ()),
        (pack("<ii", 9, 0), 9, ()),
        (pack("<ii", 9, 2) + b"ab", 9, ("ab",)),
    ],
    ids=["none", "chunks", "empty data set", "data set"],
)
def test_legacy_tails(tail: bytes, chunks: int, datasets: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy(legacy_entry(Q.encode(), [1.0]), tail=tail))
    found = read_importance(path)
    assert (found.chunks, found.datasets) == (chunks, datasets)


def test_both_forms_agree(tmp_path: Path) -> None:
    """The same means, where both forms can hold them exactly."""
    sums = RNG.integers(0, 1000, (1, 64)).astype(np.float32)
    new = read_importance(write(tmp_path / "new", {Q: (sums, [256])}))
    calls = 4
    old_values = [float(v) / 256 * calls for v in sums[0]]
    (tmp_path / "old").write_bytes(legacy(legacy_entry(Q.encode(), old_values, calls)))
    old = read_importance(tmp_path / "old")
    assert (new.entries[Q] == old.entries[Q]).all()
    assert is_legacy_importance(tmp_path / "old")
    assert not is_legacy_importance(tmp_path / "new")


def test_weights_are_shaped_for_the_tensor(tmp_path: Path) -> None:
    """A stack that was counted as one, or came in the legacy form, is one row in the file."""
    path = tmp_path / "i"
    path.write_bytes(legacy(legacy_entry(EXPERTS.encode(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])))
    found = read_importance(path)
    weights = found.weights(EXPERTS, 3, 2)
    assert weights is not None
    assert weights.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert found.weights("blk.9.attn_q.weight", 1, 2) is None
