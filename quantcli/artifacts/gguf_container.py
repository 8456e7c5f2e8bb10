"""The GGUF container: a header that is complete before one weight is read.

Layout (GGUF v3, little-endian; ggml/docs/gguf.md): magic, version, counts, key-values, tensor
descriptions, padding, then each tensor at an offset that is a multiple of ``general.alignment``.
All block sizes are fixed, so every offset is known from the plan alone and tensors can be written
in any order. Files are split as llama.cpp's gguf-split does: ``NAME-00001-of-00003.gguf``, all
key-values in the first, ``split.*`` in each, and an id by which a file of another run is known.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.errors import SourceError
from quantcli.formats.container import (
    ALIGNMENT_KEY,
    ARRAY_CODE,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_NAME_BYTES,
    SCALAR_STRUCTS,
    SPLIT_ID,
    VALUE_CODES,
    VERSION,
    padded,
)
from quantcli.types import MetaValue, text

_NUMPY = {
    "u8": "<u1", "i8": "<i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4",
    "f32": "<f4", "u64": "<u8", "i64": "<i8", "f64": "<f8", "bool": "?",
}  # fmt: skip


_SHOWN = 80
"""Characters of a value that a message quotes."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's place in a file: row-major shape, ggml type id and packed size in bytes."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One file: its header's bytes, each tensor's absolute offset and the size in bytes."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


def lay_out(
    metadata: Mapping[str, MetaValue],
    entries: Sequence[TensorEntry],
    *,
    longest_name: int = MAX_NAME_BYTES,
) -> FileLayout:
    """Fix every byte offset of a GGUF that holds ``metadata`` and ``entries`` in that order.

    SourceError for a name of more than ``longest_name`` bytes.
    """
    alignment = DEFAULT_ALIGNMENT
    if ALIGNMENT_KEY in metadata:
        alignment = int(metadata[ALIGNMENT_KEY].value)
    parts = [struct.pack("<4sIQQ", MAGIC, VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts.append(_pack_pair(key, value))
    relative: dict[str, int] = {}
    end = 0
    for entry in entries:
        if len(entry.name.encode("utf-8", "surrogateescape")) > longest_name:
            raise SourceError(
                f"the tensor name {entry.name[:80]!r} has more than the {longest_name} bytes "
                "that a GGUF holds"
            )
        relative[entry.name] = end
        parts.append(pack_string(entry.name))
        dims = tuple(reversed(entry.shape)) or (1,)
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.type_id, end))
        end = padded(end + entry.nbytes, alignment)
    header = b"".join(parts)
    header += bytes(padded(len(header), alignment) - len(header))
    offsets = {name: len(header) + start for name, start in relative.items()}
    return FileLayout(header, offsets, len(header) + end)


def lay_out_shards(
    metadata: Mapping[str, MetaValue],
    shards: Mapping[Path, Sequence[TensorEntry]],
    content: str = "",
) -> dict[Path, FileLayout]:
    """The layout of each file of a set that holds ``metadata`` and the tensors of ``shards``.

    ``content`` is a digest of what the tensors hold.
    """
    tensors = sum(map(len, shards.values()))
    set_id = identify_set(metadata, list(shards.values()), content)
    return {
        path: lay_out(shard_metadata(metadata, index, len(shards), tensors, set_id), entries)
        for index, (path, entries) in enumerate(shards.items())
    }


def identify_set(
    metadata: Mapping[str, MetaValue], shards: Sequence[Sequence[TensorEntry]], content: str
) -> str:
    """What tells a set of files from that of another run, as hexadecimal digits.

    SHA-256 of the key-values, recipe and source's digest among them, of the tensors of each file,
    and of ``content``; so the same run over again gives the same.
    """
    found = hashlib.sha256(content.encode())
    for key, value in metadata.items():
        found.update(_pack_pair(key, value))
    for entries in shards:
        found.update(struct.pack("<Q", len(entries)))
        for entry in entries:
            found.update(pack_string(entry.name))
            found.update(f"{entry.shape} {entry.type_id} {entry.nbytes}".encode())
    return found.hexdigest()


def shard_paths(path: Path, count: int) -> list[Path]:
    """The names of ``count`` shards; ``path`` itself when there is one."""
    if count == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def shard_metadata(
    metadata: Mapping[str, MetaValue], index: int, count: int, tensors: int, set_id: str
) -> dict[str, MetaValue]:
    """Key-values of shard ``index``: all in the first, ``split.*`` and the set's id in each."""
    if count == 1:
        return dict(metadata)
    keys = dict(metadata) if index == 0 else {}
    if ALIGNMENT_KEY in metadata:
        keys[ALIGNMENT_KEY] = metadata[ALIGNMENT_KEY]
    keys["split.no"] = MetaValue("u16", index)
    keys["split.count"] = MetaValue("u16", count)
    keys["split.tensors.count"] = MetaValue("i32", tensors)
    keys[SPLIT_ID] = text(set_id)
    return keys


def pack_string(value: str | bytes) -> bytes:
    """A length-prefixed UTF-8 string."""
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _pack_pair(key: str, value: MetaValue) -> bytes:
    """A key and its value; SourceError where the value is beyond its type."""
    try:
        return pack_string(key) + pack_value(value)
    except (OverflowError, FloatingPointError, struct.error, UnicodeEncodeError) as error:
        shown = repr(value.value)
        shown = shown if len(shown) < _SHOWN else shown[:_SHOWN] + "..."
        raise SourceError(
            f"the key {key} cannot be {shown}, which no {value.kind} of a GGUF holds: {error}"
        ) from error


def pack_value(value: MetaValue) -> bytes:
    """A key-value's type code and bytes."""
    if not value.kind.startswith("["):
        return struct.pack("<I", VALUE_CODES[value.kind]) + _pack_plain(value.kind, value.value)
    kind = value.kind[1:-1]
    head = struct.pack("<IIQ", ARRAY_CODE, VALUE_CODES[kind], len(value.value))
    if kind == "str":
        return head + b"".join(pack_string(item) for item in value.value)
    with np.errstate(over="raise"):
        return head + np.asarray(value.value, dtype=_NUMPY[kind]).tobytes()


def _pack_plain(kind: str, value: Any) -> bytes:
    return pack_string(value) if kind == "str" else struct.pack(f"<{SCALAR_STRUCTS[kind]}", value)
