"""The header reader against the safetensors library, on files that the library wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.broken import entry, safetensors

from quantcli.sources.safetensors import DTYPE_BITS, read_header

torch = pytest.importorskip("torch")
library = pytest.importorskip("safetensors")
from safetensors.torch import save_file  # noqa: E402 - after the skip

SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (4, 0, 2)]
TORCH_DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "int64", "int32", "int16", "int8", "uint8", "bool",
]  # fmt: skip


def test_every_dtype_and_shape(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        f"{dtype}.{'x'.join(map(str, shape))}": torch.zeros(shape, dtype=getattr(torch, dtype))
        for dtype in TORCH_DTYPES
        for shape in SHAPES
    }
    save_file(tensors, path, {"format": "pt", "ключ": "значение"})
    header = read_header(path)
    theirs = dict(library.deserialize(path.read_bytes()))
    assert header.metadata == {"format": "pt", "ключ": "значение"}
    assert header.tensors.keys() == theirs.keys()
    for name, info in header.tensors.items():
        assert list(info.shape) == theirs[name]["shape"]
        assert info.dtype == theirs[name]["dtype"]
        assert info.nbytes == len(theirs[name]["data"])
        assert info.file == path


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_name_is_the_librarys(dtype: str, tmp_path: Path) -> None:
    size = DTYPE_BITS[dtype]
    path = safetensors(tmp_path / "m", {"w": entry([8], 0, size, dtype)}, bytes(size))
    (name, theirs) = library.deserialize(path.read_bytes())[0]
    assert (name, theirs["dtype"]) == ("w", dtype)
    assert read_header(path).tensors["w"].nbytes == size


@pytest.mark.parametrize(
    "header", [b"{}", b"{}      ", b'{"__metadata__": null}', b'{"__metadata__": {}}']
)
def test_files_without_tensors(header: bytes, tmp_path: Path) -> None:
    path = safetensors(tmp_path / "m", header)
    assert library.deserialize(path.read_bytes()) == []
    assert read_header(path).tensors == {}


def test_offsets_point_at_the_bytes(tmp_path: Path) -> None:
    """The order of the JSON and the order of the bytes need not be the same."""
    lines = {"b": entry([2], 4, 6, "U8"), "a": entry([4], 0, 4, "U8"), "c": entry([0], 4, 4, "U8")}
    path = safetensors(tmp_path / "m", lines, b"aaaabb")
    header = read_header(path)
    content = path.read_bytes()
    assert content[header.offsets["b"] :][:2] == b"bb"
    assert content[header.offsets["a"] :][:4] == b"aaaa"
    assert content[header.data_start :] == b"aaaabb"
