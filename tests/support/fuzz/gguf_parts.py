"""A GGUF taken apart into its lines and put together again, by the format's own description.

Source: docs/gguf.md of ggml. Values keep the bytes that they had, so that a file comes back as it
was unless one of its parts is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack, unpack_from

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass
class Pair:
    """One key-value: its type code and the value's bytes; an array's items apart."""

    key: bytes
    code: int
    value: bytes
    sub: int | None = None
    items: list[bytes] | None = None
    count: int | None = None
    """Of an array, where it is not the number of its items."""

    def pack(self) -> bytes:
        body = self.value
        if self.items is not None:
            count = len(self.items) if self.count is None else self.count
            body = pack("<IQ", (self.sub or 0) & 0xFFFFFFFF, count & (1 << 64) - 1) + b"".join(
                self.items
            )
        return pack("<Q", len(self.key)) + self.key + pack("<I", self.code & 0xFFFFFFFF) + body


@dataclass
class Info:
    """One line of the tensor table."""

    name: bytes
    dims: list[int]
    type_id: int
    offset: int

    def pack(self) -> bytes:
        head = pack("<Q", len(self.name)) + self.name + pack("<I", len(self.dims))
        dims = b"".join(pack("<Q", dim & (1 << 64) - 1) for dim in self.dims)
        return head + dims + pack("<IQ", self.type_id & 0xFFFFFFFF, self.offset & (1 << 64) - 1)


@dataclass
class Parts:
    """A file: magic and version, key-values, tensor lines, data."""

    head: bytes
    pairs: list[Pair]
    infos: list[Info]
    data: bytes
    tensor_count: int | None = None
    pair_count: int | None = None

    def pack(self) -> bytes:
        tensors = len(self.infos) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        head = self.head + pack("<QQ", tensors & (1 << 64) - 1, pairs & (1 << 64) - 1)
        head += b"".join(pair.pack() for pair in self.pairs)
        head += b"".join(info.pack() for info in self.infos)
        return head + bytes(-len(head) % ALIGNMENT) + self.data


def string(text: bytes) -> bytes:
    """A string's bytes."""
    return pack("<Q", len(text)) + text


def take_apart(raw: bytes) -> Parts:
    """The parts of a sound file."""
    tensors, pairs = unpack_from("<QQ", raw, 8)
    at = 24

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return raw[at - count : at]

    def take_string() -> bytes:
        length = take(8)
        return length + take(int.from_bytes(length, "little"))

    def take_value(code: int) -> bytes:
        return take_string() if code == STRING else take(SIZES[code])

    found: list[Pair] = []
    for _ in range(pairs):
        key = take_string()[8:]
        code = int.from_bytes(take(4), "little")
        if code == ARRAY:
            sub, count = unpack_from("<IQ", take(12))
            found.append(Pair(key, code, b"", sub, [take_value(sub) for _ in range(count)]))
        else:
            found.append(Pair(key, code, take_value(code)))
    infos: list[Info] = []
    for _ in range(tensors):
        name = take_string()[8:]
        axes = int.from_bytes(take(4), "little")
        dims = [int.from_bytes(take(8), "little") for _ in range(axes)]
        type_id, offset = unpack_from("<IQ", take(12))
        infos.append(Info(name, dims, type_id, offset))
    at += -at % ALIGNMENT
    return Parts(raw[:8], found, infos, raw[at:])
