"""A strict reader of one safetensors file's header.

The file is a little-endian 64-bit length, that many bytes of JSON, and the tensors' bytes, which
the JSON's offsets must cover without a gap or an overlap. Every rule of the format that a file
can break is its own sentence, found before any weight is read. The ``safetensors`` library is not
used here since its NumPy side knows neither bfloat16 nor FP8; where the two differ, this reader
is the stricter (it refuses a name that occurs twice).

Source: the format's README and the ``safetensors`` crate's ``Metadata::validate``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.registry import near
from quantcli.sources.files import StoredFile
from quantcli.types import TensorInfo

HEADER_CAP = 100_000_000
"""Bytes of JSON that the format allows."""

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What the header declares; ``offsets`` are absolute positions in the file."""

    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    data_start: int
    metadata: dict[str, str]


class _RepeatedNameError(ValueError):
    """A JSON object names the same key twice."""


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of the safetensors file at ``path``; SourceError when broken."""
    file = StoredFile(path)
    try:
        return parse_header(file)
    finally:
        file.close()


def parse_header(file: StoredFile) -> SafetensorsHeader:
    """Read and check the header of an open file; SourceError names the file and the tensor."""
    entries, data_start = _read_json(file)
    metadata = _take_metadata(entries, file.path)
    payload = file.size - data_start
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        info, begin = _check_entry(name, entry, file.path, payload)
        tensors[name] = info
        spans.append((begin, begin + info.nbytes, name))
    _check_cover(spans, payload, file.path)
    offsets = {name: data_start + begin for begin, _, name in spans}
    return SafetensorsHeader(tensors, offsets, data_start, metadata)


def _read_json(file: StoredFile) -> tuple[dict[str, Any], int]:
    path = file.path
    head = file.read(0, 8)
    if len(head) < 8:
        raise SourceError(
            f"{path}: is {len(head)} bytes long, too short for a safetensors header",
            hint="the download is incomplete",
        )
    length = int.from_bytes(head, "little")
    hint = file.hint_for_head(head)
    if length == 0:
        raise SourceError(f"{path}: declares a header of 0 bytes", hint=hint)
    if length > HEADER_CAP:
        raise SourceError(
            f"{path}: declares a header of {length} bytes, more than the {HEADER_CAP} allowed",
            hint=hint or "it is not a safetensors file",
        )
    if 8 + length > file.size:
        raise SourceError(
            f"{path}: declares a header of {length} bytes but is only {file.size} bytes long",
            hint="the download is incomplete",
        )
    raw = file.read(8, length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: the header is not UTF-8 at byte {8 + error.start}") from error
    try:
        entries = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except _RepeatedNameError as error:
        raise SourceError(f"{path}: the header names {str(error)!r} twice") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: the header is not JSON: {error}") from error
    # The format wants "{" as the very first byte, so that no other file can be one by accident.
    if not isinstance(entries, dict) or not text.startswith("{"):
        raise SourceError(f"{path}: the header is not a JSON object")
    return entries, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedNameError(key)
            seen.add(key)
    return found


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _take_metadata(entries: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SourceError(f"{path}: __metadata__ is not an object of strings")
    if any("\ud800" <= c <= "\udfff" for c in "".join([*metadata, *metadata.values()])):
        raise SourceError(f"{path}: __metadata__ has half of a surrogate pair")
    return metadata


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int as well


def _check_entry(name: str, entry: Any, path: Path, payload: int) -> tuple[TensorInfo, int]:
    where = f"{path}: tensor {name!r}"
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise SourceError(f"{where} has a name that is not Unicode text")
    if not isinstance(entry, dict):
        raise SourceError(f"{where} is described by a {type(entry).__name__}, not an object")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise SourceError(f"{where} has no {key!r}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        guesses = near(dtype, DTYPE_BITS) if isinstance(dtype, str) else []
        raise SourceError(
            f"{where} has the unknown dtype {dtype!r}",
            hint=f"did you mean {' or '.join(guesses)}?" if guesses else None,
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise SourceError(f"{where} has shape {shape!r}; a list of whole numbers belongs there")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_count, span)):
        raise SourceError(f"{where} has data_offsets {span!r}; two whole numbers belong there")
    begin, end = span
    if begin > end:
        raise SourceError(f"{where} has reversed data_offsets: it begins at {begin}, ends at {end}")
    if end > payload:
        raise SourceError(
            f"{where} ends at byte {end} of the data, but the file holds only {payload}",
            hint="the download is incomplete",
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        needed = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, not whole bytes"
        raise SourceError(
            f"{where} occupies {end - begin} bytes, but shape {shape} of {dtype} is {needed}"
        )
    return TensorInfo(name, tuple(shape), dtype, end - begin, path), begin


def _check_cover(spans: list[tuple[int, int, str]], payload: int, path: Path) -> None:
    """The spans, in order of position, must follow one another and end where the file ends."""
    spans.sort()
    reached, previous = 0, ""
    for begin, end, name in spans:
        if begin < reached:
            raise SourceError(
                f"{path}: tensor {name!r} begins at byte {begin} of the data and overlaps "
                f"{previous!r}, which ends at {reached}"
            )
        if begin > reached:
            raise SourceError(
                f"{path}: bytes {reached} to {begin} of the data, before tensor {name!r}, "
                "belong to no tensor"
            )
        reached, previous = end, name
    if reached != payload:
        raise SourceError(
            f"{path}: {payload - reached} trailing bytes after the last tensor belong to no tensor"
        )
