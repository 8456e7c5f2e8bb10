"""Files made byte by byte, so that one chosen thing in them can be wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from struct import pack
from typing import Any


def safetensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file; ``header`` is JSON to be, or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: Sequence[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    """One tensor's line of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def string(value: bytes, *, length: int | None = None) -> bytes:
    """A GGUF string."""
    return pack("<Q", len(value) if length is None else length) + value


def pair(key: str | bytes, code: int, value: bytes) -> bytes:
    """A GGUF key-value of that type code."""
    return string(key.encode() if isinstance(key, str) else key) + pack("<I", code) + value


def array(code: int, count: int, values: bytes) -> bytes:
    """A GGUF array value."""
    return pack("<IQ", code, count) + values


@dataclass(frozen=True)
class Line:
    """One line of a GGUF's tensor table; ``dims`` in GGUF's order."""

    name: str | bytes = "w"
    dims: tuple[int, ...] = (4, 2)
    type_id: int = 0
    offset: int = 0

    def bytes(self) -> bytes:
        name = self.name.encode() if isinstance(self.name, str) else self.name
        dims = b"".join(pack("<Q", dim) for dim in self.dims)
        return (
            string(name)
            + pack("<I", len(self.dims))
            + dims
            + pack("<IQ", self.type_id, self.offset)
        )


@dataclass(frozen=True)
class Gguf:
    """A GGUF file; by default a sound one with one float32 tensor of 2 rows and 4 columns."""

    magic: bytes = b"GGUF"
    version: bytes = pack("<I", 3)
    pairs: tuple[bytes, ...] = (pair("general.architecture", 8, string(b"llama")),)
    lines: tuple[Line, ...] = (Line(),)
    data: bytes = bytes(32)
    tensor_count: int | None = None
    pair_count: int | None = None
    cut: int | None = field(default=None)
    """Keep only so many bytes of the whole."""

    def with_(self, **changes: Any) -> Gguf:
        return replace(self, **changes)

    def head(self) -> bytes:
        tensors = len(self.lines) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        return (
            self.magic
            + self.version
            + pack("<QQ", tensors, pairs)
            + b"".join(self.pairs)
            + b"".join(line.bytes() for line in self.lines)
        )

    def write(self, path: Path) -> Path:
        head = self.head()
        whole = head + bytes(-len(head) % 32) + self.data
        path.write_bytes(whole if self.cut is None else whole[: self.cut])
        return path


def legacy_entry(
    name: bytes, values: Sequence[float], calls: int = 1, *, count: int | None = None
) -> bytes:
    """One entry of a legacy importance matrix."""
    number = len(values) if count is None else count
    return (
        pack("<i", len(name))
        + name
        + pack("<ii", calls, number)
        + pack(f"<{len(values)}f", *values)
    )


def legacy(*entries: bytes, count: int | None = None, tail: bytes = b"") -> bytes:
    """A legacy importance matrix."""
    return pack("<i", len(entries) if count is None else count) + b"".join(entries) + tail
