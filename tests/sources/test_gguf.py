"""The GGUF reader against the gguf package, on files that its writer made."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from support import ggml_reader
from support.broken import Gguf, Line, pair, string

from quantcli.errors import SourceError
from quantcli.formats.container import SCALAR_STRUCTS, VALUE_CODES, VALUE_KINDS
from quantcli.sources.ggml_types import GGML_TYPES
from quantcli.sources.gguf import open_gguf, read_gguf
from quantcli.sources.gguf_header import gguf_type, is_gguf
from quantcli.types import MetaValue

EXTREMES: dict[str, list[Any]] = {
    "u8": [0, 255], "i8": [-128, 127], "u16": [0, 65535], "i16": [-32768, 32767],
    "u32": [0, 2**32 - 1], "i32": [-(2**31), 2**31 - 1], "u64": [0, 2**64 - 1],
    "i64": [-(2**63), 2**63 - 1], "f32": [0.5, -1e30], "f64": [0.1, -1e300],
    "bool": [True, False], "str": ["", "naïve 語 🙂"],
}  # fmt: skip


def write(path: Path, tensors: dict[str, NDArray[Any]] | None = None, **keys: Any) -> Path:
    """A GGUF by the gguf package; ``keys`` are name -> (type, value, type within an array)."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value, inner) in keys.items():
        writer.add_key_value(key, value, kind, inner)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_value_codes_are_ggufs() -> None:
    names = {"UINT": "u", "INT": "i", "FLOAT": "f", "BOOL": "bool", "STRING": "str"}
    for value in gguf.GGUFValueType:
        if value is gguf.GGUFValueType.ARRAY:
            assert int(value) not in VALUE_KINDS
            continue
        word = value.name.rstrip("0123456789")
        assert VALUE_KINDS[int(value)] == names[word] + value.name.removeprefix(word)
    assert {kind for kind in VALUE_CODES if kind != "str"} == SCALAR_STRUCTS.keys()


@pytest.mark.parametrize("kind", VALUE_CODES)
def test_values_of_every_kind(kind: str, tmp_path: Path) -> None:
    code = gguf.GGUFValueType(VALUE_CODES[kind])
    low, high = EXTREMES[kind]
    many = gguf.GGUFValueType.ARRAY
    path = write(
        tmp_path / "m.gguf", low=(code, low, None), high=(code, high, None),
        array=(many, [low, high, low], code),
    )  # fmt: skip
    found = read_gguf(path).metadata

    def stored(value: Any) -> Any:
        return struct.unpack("<f", struct.pack("<f", value))[0] if kind == "f32" else value

    assert found["low"] == MetaValue(kind, stored(low))
    assert found["high"] == MetaValue(kind, stored(high))
    assert found["array"] == MetaValue(f"[{kind}]", list(map(stored, [low, high, low])))
    assert type(found["low"].value) is type(low)


def test_strings_that_are_not_utf8_come_as_bytes(tmp_path: Path) -> None:
    words = [b"plain", b"\xff\xfe", "語".encode(), b"\xe8\xaa"]
    path = write(
        tmp_path / "m.gguf",
        words=(gguf.GGUFValueType.ARRAY, words, None),
        word=(gguf.GGUFValueType.STRING, b"\xff", None),
    )
    found = read_gguf(path).metadata
    assert found["words"].value == ["plain", b"\xff\xfe", "語", b"\xe8\xaa"]
    assert found["word"].value == b"\xff"


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(version: int, tmp_path: Path) -> None:
    path = Gguf(version=struct.pack("<I", version)).write(tmp_path / "m.gguf")
    assert ggml_reader.accepts(path)
    assert read_gguf(path).version == version


def test_empty_arrays_and_no_tensors(tmp_path: Path) -> None:
    empty = struct.pack("<IQ", VALUE_CODES["str"], 0)
    path = Gguf(pairs=(pair("none", 9, empty),), lines=(), data=b"").write(tmp_path / "m.gguf")
    assert ggml_reader.accepts(path)
    header = read_gguf(path)
    assert header.metadata == {"none": MetaValue("[str]", [])}
    assert header.tensors == {}


def test_tensors_are_where_the_gguf_package_finds_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors: dict[str, NDArray[Any]] = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "c": rng.standard_normal(7),
        "d": np.arange(6, dtype=np.int32).reshape(2, 3),
    }
    path = write(tmp_path / "m.gguf", tensors)
    store = open_gguf(path)
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert list(store.tensors) == list(theirs)
    for name, info in store.tensors.items():
        values = tensors[name].reshape(-1, tensors[name].shape[-1])
        assert info.shape == tensors[name].shape
        assert (info.dtype, info.nbytes) == (theirs[name].tensor_type.name, theirs[name].n_bytes)
        assert store.headers[0].offsets[name] == theirs[name].data_offset
        rows = store.read_rows(name, 1 % len(values), len(values))
        assert rows.tobytes() == values[1 % len(values) :].tobytes()
        assert rows.dtype == (np.uint8 if name == "d" else values.dtype)
    assert (store.read_columns("a", 1, 4) == tensors["a"][:, 1:4].T).all()
    for name, reason in (("b", r"shape \[2, 3, 4\]"), ("d", "is I32")):
        with pytest.raises(SourceError, match=reason):
            store.read_columns(name, 0, 1)
    with pytest.raises(IndexError):
        store.read_rows("a", 0, 4)
    store.close()


def test_bfloat16(tmp_path: Path) -> None:
    data = np.array([0x3F80, 0xC000, 0x7F7F, 1], "<u2")
    path = Gguf(lines=(Line(dims=(2, 2), type_id=30),), data=data.tobytes()).write(tmp_path / "m")
    store = open_gguf(path)
    rows = store.read_rows("w", 0, 2)
    assert str(rows.dtype) == "bfloat16"
    expected = (data.astype(np.uint32) << 16).view(np.float32).reshape(2, 2)
    assert (rows.astype(np.float32) == expected).all()
    assert str(store.read_columns("w", 1, 2).dtype) == "bfloat16"
    store.close()


@pytest.mark.parametrize("type_id", [i for i, kind in GGML_TYPES.items() if kind.block > 1])
def test_block_rows_are_raw_bytes(type_id: int, tmp_path: Path) -> None:
    kind = GGML_TYPES[type_id]
    data = np.random.default_rng(type_id).integers(0, 256, 6 * kind.nbytes, dtype=np.uint8)
    line = Line(dims=(2 * kind.block, 3), type_id=type_id)
    path = Gguf(lines=(line,), data=data.tobytes()).write(tmp_path / "m.gguf")
    assert ggml_reader.accepts(path)
    store = open_gguf(path)
    assert store.tensors["w"].dtype == kind.name
    assert (store.read_rows("w", 1, 3) == data.reshape(3, -1)[1:]).all()
    store.close()


@pytest.mark.parametrize("dims", [(), (5,), (5, 1, 1), (5, 2, 3, 4)])
def test_axes_are_turned_round(dims: tuple[int, ...], tmp_path: Path) -> None:
    size = int(np.prod(dims, dtype=np.int64)) * 4
    path = Gguf(lines=(Line(dims=dims),), data=bytes(size)).write(tmp_path / "m.gguf")
    assert ggml_reader.accepts(path)
    info = read_gguf(path).tensors["w"]
    assert (info.shape, info.nbytes) == (tuple(reversed(dims)), size)


def test_alignment(tmp_path: Path) -> None:
    key = pair("general.alignment", 4, struct.pack("<I", 64))
    lines = (Line("a"), Line("b", offset=64))
    file = Gguf(pairs=(key,), lines=lines)
    head = file.head()
    path = tmp_path / "m.gguf"
    path.write_bytes(head + bytes(-len(head) % 64) + bytes(64 + 32))
    assert ggml_reader.accepts(path)
    header = read_gguf(path)
    assert (header.alignment, header.data_start % 64) == (64, 0)
    assert header.offsets["b"] == header.data_start + 64


def test_large_vocabulary_is_fast(tmp_path: Path) -> None:
    """A quarter of a million tokens: parsed well under half a second."""
    words = [f"token {number}" for number in range(1 << 18)]
    values = b"".join(map(string, map(str.encode, words)))
    key = pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, len(words)) + values)
    path = Gguf(pairs=(key,)).write(tmp_path / "m.gguf")
    times = []
    for _ in range(3):
        start = time.process_time()
        header = read_gguf(path)
        times.append(time.process_time() - start)
    assert header.metadata["tokenizer.ggml.tokens"].value == words
    assert min(times) < 0.5


def test_memory_is_what_was_asked_for(tmp_path: Path) -> None:
    line = Line(dims=(1024, 4096))
    path = Gguf(lines=(line,), data=b"").write(tmp_path / "m.gguf")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (16 << 20))
    tracemalloc.start()
    store = open_gguf(path)
    for start in range(0, 4096, 64):
        store.read_rows("w", start, start + 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (64 * 1024 * 4) * 1.5 + (1 << 20)
    store.close()


@pytest.mark.parametrize(("kind", "expected"), [("model", "model"), ("imatrix", "imatrix")])
def test_kind_of_file(kind: str, expected: str, tmp_path: Path) -> None:
    path = Gguf(pairs=(pair("general.type", 8, string(kind.encode())),)).write(tmp_path / "m")
    assert is_gguf(path)
    assert gguf_type(path) == expected
    assert gguf_type(Gguf().write(tmp_path / "n")) is None
