"""A safetensors file broken in one named way: its own sentence, with the file and the tensor.

The safetensors library refuses each of them as well, except where the format's own promise (no
name twice) is kept more strictly here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors as library
from support.broken import entry, safetensors

from quantcli.errors import SourceError
from quantcli.sources.safetensors import read_header

Build = Callable[[Path], Path]


class Case(NamedTuple):
    build: Build
    sentence: str
    tensor: str | None = None
    library_refuses: bool = True


def one(line: object, data: bytes = bytes(32), name: str = "layer.w") -> Build:
    return lambda path: safetensors(path, {name: line}, data)


def raw(content: bytes) -> Build:
    return lambda path: (path.write_bytes(content), path)[1]


def head(text: bytes, data: bytes = b"") -> Build:
    return lambda path: safetensors(path, text, data)


GOOD = json.dumps(entry([2, 4], 0, 32)).encode()

CASES: dict[str, Case] = {
    "empty file": Case(raw(b""), "is 0 bytes long, too short"),
    "seven bytes": Case(raw(bytes(7)), "is 7 bytes long, too short"),
    "header of no length": Case(head(b"", bytes(8)), "a header of 0 bytes"),
    "header above the cap": Case(
        lambda path: safetensors(path, b"{}", length=100_000_001), "more than the 100000000 allowed"
    ),
    "header beyond the file": Case(
        lambda path: safetensors(path, b"{}", length=4096), "is only 10 bytes long"
    ),
    "Git LFS pointer": Case(
        raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"), "git lfs pull"
    ),
    "web page": Case(raw(b"<!DOCTYPE html><html></html>"), "looks like a web page"),
    "not UTF-8": Case(head(b'{"\xff": 1}'), "is not UTF-8 at byte 10"),
    "not JSON": Case(head(b"{'a': 1}"), "the header is not JSON"),
    "nested without end": Case(head(b'{"a":' * 50_000), "the header is not JSON"),
    "a JSON list": Case(head(b"[1, 2]"), "is not a JSON object"),
    "space before the object": Case(head(b'  {"a": 1}'), "is not a JSON object"),
    "name twice": Case(
        head(b'{"layer.w": %s, "layer.w": %s}' % (GOOD, GOOD), bytes(32)),
        "names 'layer.w' twice",
        library_refuses=False,
    ),
    "key of a tensor twice": Case(
        head(b'{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
        "names 'dtype' twice",
    ),
    "name of half a character": Case(
        head(b'{"\\ud800": %s}' % GOOD, bytes(32)), "a name that is not Unicode text"
    ),
    "metadata with half of a character": Case(
        head(b'{"__metadata__":{"a":"\\ud800"},"w":%s}' % GOOD, bytes(32)),
        "__metadata__ has half of a surrogate pair",
    ),
    "metadata of numbers": Case(
        lambda path: safetensors(path, {"__metadata__": {"a": 1}}), "not an object of strings"
    ),
    "metadata is a list": Case(
        lambda path: safetensors(path, {"__metadata__": []}), "not an object of strings"
    ),
    "entry is a list": Case(one([1, 2]), "described by a list, not an object", "layer.w"),
    "no dtype": Case(one({"shape": [8], "data_offsets": [0, 32]}), "has no 'dtype'", "layer.w"),
    "no shape": Case(one({"dtype": "F32", "data_offsets": [0, 32]}), "has no 'shape'", "layer.w"),
    "no offsets": Case(one({"dtype": "F32", "shape": [8]}), "has no 'data_offsets'", "layer.w"),
    "unknown dtype": Case(
        one(entry([8], 0, 32, "BF61")),
        "the unknown dtype 'BF61' (did you mean BF16",
        "layer.w",
    ),
    "dtype is a number": Case(one(entry([8], 0, 32, 7)), "the unknown dtype 7", "layer.w"),
    "dtype is a list": Case(one(entry([8], 0, 32, ["F32"])), "unknown dtype ['F32']", "layer.w"),
    "negative dimension": Case(one(entry([-8, -1], 0, 32)), "has shape [-8, -1]", "layer.w"),
    "fractional dimension": Case(one(entry([8.0], 0, 32)), "has shape [8.0]", "layer.w"),
    "dimension is a truth value": Case(one(entry([8, True], 0, 32)), "[8, True]", "layer.w"),
    "shape is a number": Case(
        one({"dtype": "F32", "shape": 8, "data_offsets": [0, 32]}), "has shape 8", "layer.w"
    ),
    "offsets are text": Case(one(entry([8], "0", "32")), "has data_offsets ['0', '32']", "layer.w"),
    "three offsets": Case(
        one({"dtype": "F32", "shape": [8], "data_offsets": [0, 16, 32]}),
        "two whole numbers belong there",
        "layer.w",
    ),
    "negative offset": Case(one(entry([8], -32, 0)), "has data_offsets [-32, 0]", "layer.w"),
    "reversed offsets": Case(one(entry([8], 32, 0)), "reversed data_offsets", "layer.w"),
    "beyond the file": Case(
        one(entry([16], 0, 64)),
        "ends at byte 64 of the data, but the file holds only 32",
        "layer.w",
    ),
    "too few bytes for the shape": Case(
        one(entry([2, 5], 0, 32)), "occupies 32 bytes, but shape [2, 5] of F32 is 40", "layer.w"
    ),
    "shape beyond all numbers": Case(
        one(entry([2**63, 2**63], 0, 32)), "occupies 32 bytes, but shape", "layer.w"
    ),
    "half a byte": Case(
        one(entry([3], 0, 2, "F4"), bytes(2)), "is 12 bits, not whole bytes", "layer.w"
    ),
    "overlap": Case(
        lambda path: safetensors(path, {"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)),
        "begins at byte 8 of the data and overlaps 'a', which ends at 16",
        "b",
    ),
    "hole": Case(
        lambda path: safetensors(path, {"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, bytes(24)),
        "bytes 8 to 16 of the data, before tensor 'b', belong to no tensor",
        "b",
    ),
    "hole at the start": Case(
        one(entry([6], 8, 32)), "bytes 0 to 8 of the data, before tensor", "layer.w"
    ),
    "trailing bytes": Case(one(entry([7], 0, 28)), "4 trailing bytes after the last tensor"),
    "trailing bytes and no tensor": Case(head(b"{}", bytes(3)), "3 trailing bytes"),
}


@pytest.mark.parametrize("name", CASES)
def test_sentence(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = case.build(tmp_path / "model.safetensors")
    with pytest.raises(SourceError) as caught:
        read_header(path)
    said = str(caught.value)
    assert case.sentence in said
    assert str(path) in said
    assert case.tensor is None or f"tensor {case.tensor!r}" in said
    assert "\n" not in said


@pytest.mark.parametrize("name", CASES)
def test_library_agrees(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    content = case.build(tmp_path / "model.safetensors").read_bytes()
    if case.library_refuses:
        with pytest.raises(library.SafetensorError):
            library.deserialize(content)
    else:
        library.deserialize(content)


def test_missing_and_irregular(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"absent.*there is no such file"):
        read_header(tmp_path / "absent")
    with pytest.raises(SourceError, match="is not a regular file"):
        read_header(tmp_path)
    # Nobody writes to this pipe; a reader that waits for them would never end.
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="is not a regular file"):
        read_header(tmp_path / "pipe")


def test_sound_file_is_read(tmp_path: Path) -> None:
    """The builder's own ground: unchanged, its file is sound."""
    path = safetensors(tmp_path / "m.safetensors", {"layer.w": entry([2, 4], 0, 32)}, bytes(32))
    assert read_header(path).tensors["layer.w"].shape == (2, 4)
