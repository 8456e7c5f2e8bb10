"""An output's files that are filled while its tensors are still being found, by one run or several.

What a method has encoded goes to its place in the file that will be published, so that the disk
holds it once. The files lie in folders of our own beside their places (``.NAME.partial-output``),
at their full size from the start. Whoever records that a tensor is there has its digest from here,
and its bytes are on the disk by then; a run that goes on checks them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantcli.artifacts.space import reserve
from quantcli.artifacts.staging import held_path, naming, own_folder, remove_own
from quantcli.errors import OutputError
from quantcli.formats.base import Bytes
from quantcli.systems import BINARY, CLOEXEC, NOFOLLOW, flush_folder, read_at, write_at

_PIECE = 16 << 20


@dataclass(frozen=True, slots=True)
class RowsPlace:
    """Where a tensor's packed rows, ``width`` bytes each, lie in the file that will be ``path``."""

    path: Path
    offset: int
    rows: int
    width: int


class HeldOutput:
    """Files of known ``sizes`` and the places in them of the tensors that a method may encode.

    ``whole``: they are published already, and nothing of them is held.
    """

    def __init__(
        self, sizes: Mapping[Path, int], places: Mapping[str, RowsPlace], *, whole: bool = False
    ) -> None:
        self._sizes = sizes
        self._places = places
        self.whole = whole

    @property
    def files(self) -> dict[Path, Path]:
        """Where each file is until it is published."""
        return {path: held_path(path) / "file" for path in self._sizes}

    @property
    def identity(self) -> str:
        """A digest of all places, which must not change where a run goes on."""
        found = hashlib.sha256()
        for path, size in self._sizes.items():
            found.update(f"{path.name}\0{size}\0".encode())
        for name, place in self._places.items():
            found.update(f"{name}\0{place.path.name}\0{place.offset}\0{place.width}\0".encode())
        return found.hexdigest()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def create(self) -> None:
        """New files in place of an earlier run's; OutputError where the disk has no room."""
        try:
            for path, held in self.files.items():
                own_folder(held.parent, empty=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY | NOFOLLOW | CLOEXEC
                with naming(path):
                    descriptor = os.open(held, flags, 0o666)
                    try:
                        reserve(descriptor, self._sizes[path])
                    finally:
                        os.close(descriptor)
                    flush_folder(held.parent)
                    flush_folder(path.absolute().parent)
        except BaseException:
            self.remove()
            raise

    def take_up(self) -> None:
        """Go on with an earlier run's files; OutputError where they are not there.

        Some may have their names already, where it was stopped between two of them.
        """
        for path, size in self._sizes.items():
            found = self._where(path)
            if not found.is_file() or found.stat().st_size != size:
                raise OutputError(
                    f"{self.files[path]}, which an interrupted run was filling, is gone",
                    hint="--force starts anew",
                )

    def settle(self) -> None:
        """After all that was recorded has been checked: no file has its name yet."""
        for path, held in self.files.items():
            if self._where(path) != held:
                own_folder(held.parent, empty=False)
                with naming(path):
                    path.replace(held)

    def put(self, packed: Mapping[str, Bytes]) -> dict[str, str]:
        """Write tensors, each (rows, row bytes); their SHA-256 when they are on the disk."""
        digests: dict[str, str] = {}
        used: dict[Path, list[str]] = {}
        for name in packed:
            used.setdefault(self._places[name].path, []).append(name)
        for path, names in used.items():
            with naming(path):
                descriptor = os.open(self.files[path], os.O_RDWR | BINARY | NOFOLLOW | CLOEXEC)
                try:
                    for name in names:
                        digests[name] = self._put(descriptor, name, packed[name])
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        return digests

    def _put(self, descriptor: int, name: str, rows: Bytes) -> str:
        place = self._places[name]
        if rows.shape != (place.rows, place.width):
            raise ValueError(f"{name} has {rows.shape}, its place ({place.rows}, {place.width})")
        view = np.ascontiguousarray(rows).data.cast("B") if rows.size else memoryview(b"")
        digest, offset = hashlib.sha256(view).hexdigest(), place.offset
        while view:
            written = write_at(descriptor, view, offset)
            view, offset = view[written:], offset + written
        return digest

    def read_rows(self, name: str, start: int, stop: int) -> Bytes:
        """Packed rows ``start:stop`` of a tensor that was put, uint8 (stop - start, row bytes)."""
        place = self._places[name]
        found = self._where(place.path)
        wanted, offset = (stop - start) * place.width, place.offset + start * place.width
        raw = bytearray()
        with naming(found):
            descriptor = os.open(found, os.O_RDONLY | BINARY | NOFOLLOW | CLOEXEC)
            try:
                while len(raw) < wanted:
                    part = read_at(descriptor, wanted - len(raw), offset + len(raw))
                    if not part:
                        raise OutputError(f"{found} is cut short", hint="--force starts anew")
                    raw += part
            finally:
                os.close(descriptor)
        return np.frombuffer(raw, np.uint8).reshape(-1, place.width)

    def check(self, name: str, digest: str) -> None:
        """OutputError unless the tensor is as it was put."""
        place, found = self._places[name], hashlib.sha256()
        step = max(1, _PIECE // max(1, place.width))
        for start in range(0, place.rows, step):
            found.update(self.read_rows(name, start, min(start + step, place.rows)).data)
        if found.hexdigest() != digest:
            raise OutputError(
                f"{self._where(place.path)}: {name} is not as an interrupted run left it",
                hint="--force starts anew",
            )

    def remove(self) -> None:
        """Take the folders away, and what of the files is not published."""
        for held in self.files.values():
            remove_own(held.parent)

    def _where(self, path: Path) -> Path:
        """The file until it is published, or the published one."""
        held = self.files[path]
        return held if held.exists() or not path.is_file() else path
