"""An importance matrix in the other form says the same: quantizing with it gives the same bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

import quantcli
from quantcli.errors import SourceError, UsageError
from quantcli.sources.imatrix import read_importance

ENTRIES = {"blk.0.ffn_down.weight": 768, "blk.1.attn_q.weight": 256, "blk.2.ffn_up.weight": 256}


def draw(columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(columns).astype(np.float32) * 30


def write_gguf(path: Path, *, stacks: int = 1) -> Path:
    """As llama-imatrix writes it, by gguf's own writer."""
    writer = GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for seed, (name, columns) in enumerate(ENTRIES.items()):
        sums = np.stack([draw(columns, seed + 10 * i) for i in range(stacks)])
        counts = np.array([[512 * 7 - 100 * i] for i in range(stacks)], np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_legacy(path: Path) -> Path:
    body = struct.pack("<i", len(ENTRIES))
    for seed, (name, columns) in enumerate(ENTRIES.items()):
        raw = name.encode()
        body += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", 7, columns)
        body += draw(columns, seed).tobytes()
    path.write_bytes(body + struct.pack("<ii", 7, 8) + b"text.txt")
    return path


def test_legacy_becomes_gguf(mini: Path, tmp_path: Path) -> None:
    source = write_legacy(tmp_path / "m.dat")
    (path,) = quantcli.export(source, tmp_path / "m.imatrix.gguf", to="imatrix").paths
    stored = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    for seed, (name, columns) in enumerate(ENTRIES.items()):
        # llama.cpp's own way: values and calls times the window.
        assert np.array_equal(stored[f"{name}.in_sum2"].ravel(), draw(columns, seed) * 512)
        assert stored[f"{name}.counts"].ravel().tolist() == [7 * 512]
    old, new = read_importance(source), read_importance(path)
    assert (new.datasets, new.chunks) == (old.datasets, old.chunks) == (("text.txt",), 7)
    for name in ENTRIES:
        assert np.array_equal(old.entries[name], new.entries[name])
    one, other = (
        quantcli.quantize(mini, tmp_path / f"{p.suffix}.gguf", type="Q4_K_M", imatrix=str(p))
        for p in (source, path)
    )
    for ours, theirs in zip(
        GGUFReader(one.paths[0]).tensors, GGUFReader(other.paths[0]).tensors, strict=True
    ):
        assert np.array_equal(ours.data, theirs.data), ours.name


@pytest.mark.parametrize("stacks", [1, 3])
def test_gguf_becomes_legacy(stacks: int, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", stacks=stacks)
    (path,) = quantcli.export(source, tmp_path / "m.dat", to="dat").paths
    body = path.read_bytes()
    (count,) = struct.unpack_from("<i", body)
    place = 4
    found = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<i", body, place)
        name = body[place + 4 : place + 4 + length].decode()
        calls, values = struct.unpack_from("<ii", body, place + 4 + length)
        place += 12 + length
        found[name] = np.frombuffer(body, "<f4", values, place) / calls
        place += 4 * values
    assert body[place:] == struct.pack("<ii", 7, 8) + b"text.txt"
    assert found.keys() == ENTRIES.keys()
    for seed, (name, columns) in enumerate(ENTRIES.items()):
        means = np.concatenate(
            [draw(columns, seed + 10 * i) / np.float32(512 * 7 - 100 * i) for i in range(stacks)]
        )
        np.testing.assert_allclose(found[name], means, rtol=2e-7)


def test_there_and_back_keeps_the_means(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf")
    (legacy,) = quantcli.export(source, tmp_path / "m.dat", to="dat").paths
    (again,) = quantcli.export(legacy, tmp_path / "again.gguf", to="imatrix").paths
    one, other = read_importance(source), read_importance(again)
    for name in ENTRIES:
        np.testing.assert_allclose(one.entries[name], other.entries[name], rtol=3e-7)


def test_what_is_refused(mini: Path, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="an importance matrix of that form already"):
        quantcli.export(source, tmp_path / "x.gguf", to="imatrix")
    with pytest.raises(SourceError, match="is no importance matrix"):
        quantcli.export(mini, tmp_path / "x.dat", to="dat")
    with pytest.raises(SourceError, match="is an importance matrix"):
        quantcli.export(source, tmp_path / "x.gguf", to="gguf")
    broken = tmp_path / "b.dat"
    broken.write_bytes(write_legacy(tmp_path / "m.dat").read_bytes()[:-20])
    with pytest.raises(SourceError, match="ends inside"):
        quantcli.export(broken, tmp_path / "x.gguf", to="imatrix")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.dat", "m.dat", "m.gguf"]
