"""A strict reader of the head of one GGUF file: key-values and tensor table, no tensor data.

Little-endian, versions 2 and 3. The head has no length of its own, so it is parsed over a buffer
that grows (see `gguf_cursor`); every declared count and length is held against what is left of the
file before anything is allocated, so a broken file can cost no more memory than it has bytes.
Tensors must lie one after another, each padded to the alignment, as llama.cpp demands.

Refused besides what is broken: big-endian files, version 1, arrays of arrays. Source: ggml's
docs/gguf.md and gguf_init_from_reader in gguf.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import numpy as np

from quantcli.errors import SourceError
from quantcli.formats import container, format_by_id
from quantcli.sources.files import StoredFile
from quantcli.sources.ggml_types import GGML_TYPES, REMOVED_TYPES, GgmlType
from quantcli.sources.gguf_cursor import U32, U64, Cursor
from quantcli.types import MetaValue, TensorInfo

_SCALARS = {kind: Struct("<" + letter) for kind, letter in container.SCALAR_STRUCTS.items()}
_SMALLEST_PAIR = 8 + 1 + 4 + 1
"""Bytes of the shortest key-value: a one-letter key and a one-byte value."""
_SMALLEST_TENSOR = 8 + 4 + 4 + 8
"""Bytes of the shortest line of the tensor table: no name, no dimension."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The head of a GGUF file; ``offsets`` are absolute positions in the file."""

    path: Path
    version: int
    metadata: dict[str, MetaValue]
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    alignment: int
    data_start: int


def is_gguf(path: Path) -> bool:
    """Whether the file begins with GGUF's magic."""
    file = StoredFile(path)
    try:
        return file.read(0, 4) == container.MAGIC
    finally:
        file.close()


def gguf_type(path: Path) -> str | None:
    """``general.type`` of a GGUF file ("model", "imatrix" ...), None when it has none.

    Reads no further than that key, which comes before the vocabulary.
    """
    file = StoredFile(path)
    try:
        cursor = Cursor(file)
        _, _, pair_count = _read_start(cursor)
        for key, found in _read_pairs(cursor, pair_count):
            if key == "general.type":
                return str(found.value)
        return None
    finally:
        file.close()


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the head of the GGUF file at ``path``; SourceError when it is broken."""
    file = StoredFile(path)
    try:
        return parse_gguf(file)
    finally:
        file.close()


def parse_gguf(file: StoredFile) -> GgufHeader:
    """Read and check the head of an open file; SourceError names the file, key and tensor."""
    cursor = Cursor(file)
    version, tensor_count, pair_count = _read_start(cursor)
    metadata = dict(_read_pairs(cursor, pair_count))
    alignment = _alignment(metadata, file.path)
    table: list[tuple[TensorInfo, int]] = []
    seen: set[str] = set()
    for number in range(tensor_count):
        info, offset = _read_tensor(cursor, number)
        if info.name in seen:
            raise SourceError(f"{file.path}: tensor {info.name!r} is listed twice")
        seen.add(info.name)
        table.append((info, offset))
    start = container.padded(cursor.position, alignment) if table else cursor.position
    _check_layout(table, alignment, file.size - start, file.path)
    tensors = {info.name: info for info, _ in table}
    offsets = {info.name: start + offset for info, offset in table}
    return GgufHeader(file.path, version, metadata, tensors, offsets, alignment, start)


def _read_start(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors and number of key-values."""
    version = _read_version(cursor)
    tensor_count = cursor.count("tensors", _SMALLEST_TENSOR, "the number of tensors")
    pair_count = cursor.count("key-values", _SMALLEST_PAIR, "the number of key-values")
    return version, tensor_count, pair_count


def _read_version(cursor: Cursor) -> int:
    path = cursor.file.path
    head = cursor.file.read(0, 8)
    if head[:4] != container.MAGIC:
        raise SourceError(
            f"{path}: begins with {head[:4]!r}, not with {container.MAGIC!r}; it is not a GGUF "
            "file",
            hint=cursor.file.hint_for_head(head),
        )
    cursor.position = 4
    version: int = cursor.take(U32, "the version")
    if version not in container.READABLE_VERSIONS:
        # A small number stored big-endian has its bytes at the other end.
        if version & 0xFFFF == 0 and version:
            raise SourceError(
                f"{path}: is a big-endian GGUF file; only little-endian ones are read",
                hint="convert it: python -m gguf.scripts.gguf_convert_endian FILE little",
            )
        raise SourceError(
            f"{path}: is GGUF version {version}; versions "
            f"{' and '.join(map(str, container.READABLE_VERSIONS))} are read"
        )
    return version


def _read_pairs(cursor: Cursor, number: int) -> Iterator[tuple[str, MetaValue]]:
    path = cursor.file.path
    seen: set[str] = set()
    for index in range(number):
        raw = cursor.text(f"key {index}")
        if not raw or len(raw) > container.MAX_KEY_BYTES:
            raise SourceError(
                f"{path}: key {index} is {len(raw)} bytes long; 1 to {container.MAX_KEY_BYTES} "
                "are allowed"
            )
        key = _decode(raw, f"key {index}", path)
        if key in seen:
            raise SourceError(f"{path}: key {key!r} occurs twice")
        seen.add(key)
        yield key, _read_value(cursor, key)


def _read_value(cursor: Cursor, key: str) -> MetaValue:
    what = f"the value of key {key!r}"
    code: int = cursor.take(U32, what)
    if code != container.ARRAY_CODE:
        kind = _kind(code, key, cursor.file.path)
        if kind == "str":
            return MetaValue("str", _text_or_bytes(cursor.text(what)))
        value = cursor.take(_SCALARS[kind], what)
        return MetaValue(kind, _truths([value], key, cursor)[0] if kind == "bool" else value)
    code = cursor.take(U32, what)
    if code == container.ARRAY_CODE:
        raise SourceError(f"{cursor.file.path}: key {key!r} is an array of arrays, as none may be")
    kind = _kind(code, key, cursor.file.path)
    if kind == "str":
        number = cursor.count(f"strings in key {key!r}", 8, what)
        return MetaValue("[str]", cursor.texts(number, what))
    layout = _SCALARS[kind]
    number = cursor.count(f"values in key {key!r}", layout.size, what)
    data = cursor.need(number * layout.size, what)
    letter = container.SCALAR_STRUCTS[kind]
    values = np.frombuffer(data, f"<{np.dtype(letter).str[1:]}", number, cursor.position).tolist()
    cursor.position += number * layout.size
    return MetaValue(f"[{kind}]", _truths(values, key, cursor) if kind == "bool" else values)


def _kind(code: int, key: str, path: Path) -> str:
    kind = container.VALUE_KINDS.get(code)
    if kind is None:
        raise SourceError(f"{path}: key {key!r} has the unknown value type {code}")
    return kind


def _truths(values: list[int], key: str, cursor: Cursor) -> list[bool]:
    if any(value > 1 for value in values):
        raise SourceError(
            f"{cursor.file.path}: key {key!r} holds the truth value {max(values)}; 0 and 1 are "
            "allowed"
        )
    return [value == 1 for value in values]


def _text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _decode(raw: bytes, what: str, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: {what} is not UTF-8: {raw[:80]!r}") from error


def _alignment(metadata: dict[str, MetaValue], path: Path) -> int:
    declared = metadata.get(container.ALIGNMENT_KEY)
    if declared is None:
        return container.DEFAULT_ALIGNMENT
    value = declared.value
    if declared.kind != "u32" or value < 1 or value & (value - 1):
        raise SourceError(
            f"{path}: {container.ALIGNMENT_KEY} is {value!r} ({declared.kind}); a power of two as "
            "u32 belongs there"
        )
    return int(value)


def _read_tensor(cursor: Cursor, number: int) -> tuple[TensorInfo, int]:
    path = cursor.file.path
    raw = cursor.text(f"the name of tensor {number}")
    if len(raw) > container.MAX_NAME_BYTES:
        raise SourceError(
            f"{path}: the name of tensor {number} is {len(raw)} bytes long; at most "
            f"{container.MAX_NAME_BYTES} are allowed: {raw[:80]!r}"
        )
    name = _decode(raw, f"the name of tensor {number}", path)
    where = f"{path}: tensor {name!r}"
    what = f"the description of tensor {name!r}"
    dimensions: int = cursor.take(U32, what)
    if dimensions > container.MAX_DIMENSIONS:
        raise SourceError(
            f"{where} has {dimensions} dimensions; at most {container.MAX_DIMENSIONS} are allowed"
        )
    extents = [int(cursor.take(U64, what)) for _ in range(dimensions)]
    if 0 in extents:
        raise SourceError(f"{where} has a dimension of length 0: {extents}")
    if math.prod(extents) >= 2**63:
        raise SourceError(f"{where} has dimensions {extents}, more weights than can be counted")
    kind = _tensor_type(cursor.take(U32, what), where)
    width = extents[0] if extents else 1
    if width % kind.block:
        raise SourceError(
            f"{where} has rows of {width} weights, not a multiple of {kind.name}'s block of "
            f"{kind.block}"
        )
    offset: int = cursor.take(U64, what)
    nbytes = math.prod(extents) // kind.block * kind.nbytes
    return TensorInfo(name, tuple(reversed(extents)), kind.name, nbytes, path), offset


def _tensor_type(type_id: int, where: str) -> GgmlType:
    kind = GGML_TYPES.get(type_id)
    if kind is not None:
        return kind
    if type_id in REMOVED_TYPES:
        raise SourceError(
            f"{where} has ggml type {type_id} ({REMOVED_TYPES[type_id]}), which llama.cpp dropped",
            hint="make the file again from the original model",
        )
    plugin = format_by_id(type_id)
    if plugin is not None:
        return GgmlType(plugin.name, plugin.block, plugin.nbytes)
    raise SourceError(
        f"{where} has the unknown ggml type {type_id}",
        hint="it may come from a fork of llama.cpp with types of its own",
    )


def _check_layout(
    table: list[tuple[TensorInfo, int]], alignment: int, payload: int, path: Path
) -> None:
    expected = 0
    for info, offset in table:
        where = f"{path}: tensor {info.name!r}"
        if offset % alignment:
            raise SourceError(
                f"{where} begins at offset {offset}, not a multiple of the alignment {alignment}"
            )
        if offset < expected:
            raise SourceError(
                f"{where} begins at offset {offset} and overlaps the tensor before it, which ends "
                f"at {expected}"
            )
        if offset > expected:
            raise SourceError(
                f"{where} begins at offset {offset}, leaving a gap after {expected}, where it "
                "belongs"
            )
        if offset + info.nbytes > payload:
            raise SourceError(
                f"{where} ends {offset + info.nbytes - payload} bytes beyond the end of the file",
                hint="the file is truncated",
            )
        expected = container.padded(offset + info.nbytes, alignment)
