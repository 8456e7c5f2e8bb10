"""A reader for Protocol Buffers messages without their schema: fields by number.

``tokenizer.model`` needs five fields of one fixed format, so some forty lines replace the
sentencepiece package and its generated code. Groups, which proto2 deprecated and SentencePiece
never used, are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

Field = int | bytes
"""A varint as an integer; fixed-size and length-delimited values as bytes."""


def read_fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Each field's number and value in order; ValueError where ``data`` is no message."""
    place = 0
    while place < len(data):
        tag, place = _read_varint(data, place)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("field number 0")
        if wire == 0:
            value, place = _read_varint(data, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _read_varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if size > len(data) - place:
            raise ValueError("a field that runs past the end")
        yield number, data[place : place + size]
        place += size


def as_float(value: Field) -> float:
    """A 32-bit float field; ValueError for a field of another type."""
    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError("a number that is not a 32-bit float")
    return float(struct.unpack("<f", value)[0])


def as_int(value: Field) -> int:
    """An int32 field; negative ones are written as 64-bit two's complement."""
    if not isinstance(value, int):
        raise ValueError("a number that is not an integer")
    return value - (1 << 64) if value >= 1 << 63 else value


def as_bytes(value: Field) -> bytes:
    """A bytes, string or message field."""
    if not isinstance(value, bytes):
        raise ValueError("text that is a number")
    return value


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("a number that runs past the end")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")
