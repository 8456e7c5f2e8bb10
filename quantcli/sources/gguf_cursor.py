"""A reading position in the head of a GGUF file.

The head does not say how long it is, so it is read into a buffer that doubles whenever it is used
up. A length is held against what is left of the file before memory is taken for it.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from quantcli.errors import SourceError
from quantcli.sources.files import StoredFile

U32, U64 = Struct("<I"), Struct("<Q")
_FIRST_READ = 1 << 18


class Cursor:
    """A position in the head, over a buffer that grows when it is used up."""

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self.position = 0
        self._data = bytearray(file.read(0, _FIRST_READ))

    @property
    def left(self) -> int:
        """Bytes of the file beyond the position."""
        return self.file.size - self.position

    def need(self, count: int, what: str) -> bytearray:
        """The buffer, holding at least ``count`` bytes at the position."""
        short = self.position + count - len(self._data)
        if short > 0:
            if count > self.left:
                raise SourceError(
                    f"{self.file.path}: ends inside {what}: {count} bytes belong at byte "
                    f"{self.position}, {max(self.left, 0)} are left",
                    hint="the file is truncated",
                )
            self._data += self.file.read(len(self._data), max(short, len(self._data)))
        return self._data

    def take(self, layout: Struct, what: str) -> Any:
        """The next value of that layout."""
        data = self.need(layout.size, what)
        (value,) = layout.unpack_from(data, self.position)
        self.position += layout.size
        return value

    def count(self, things: str, smallest: int, what: str) -> int:
        """A 64-bit count of ``things`` of at least ``smallest`` bytes, which the file can hold."""
        number: int = self.take(U64, what)
        if number * smallest > self.left:
            raise SourceError(
                f"{self.file.path}: declares {number} {things}, more than its {self.file.size} "
                "bytes can hold",
                hint="the file is damaged, or its download is incomplete",
            )
        return number

    def text(self, what: str) -> bytes:
        """The next string's bytes."""
        length = self.take(U64, f"the length of {what}")
        data = self.need(length, what)
        value = bytes(data[self.position : self.position + length])
        self.position += length
        return value

    def texts(self, number: int, what: str) -> list[str | bytes]:
        """``number`` strings; bytes where one is not UTF-8.

        The one loop that matters for speed (vocabularies and merges), hence written out.
        """
        data, place, end = self._data, self.position, len(self._data)
        unpack = U64.unpack_from
        values: list[str | bytes] = []
        add = values.append
        for _ in range(number):
            if place + 8 > end:
                self.position = place
                end = len(self.need(8, what))
            (length,) = unpack(data, place)
            place += 8
            stop = place + length
            if stop > end:
                self.position = place
                end = len(self.need(length, what))
            try:
                add(data[place:stop].decode())
            except UnicodeDecodeError:
                add(bytes(data[place:stop]))
            place = stop
        self.position = place
        return values
