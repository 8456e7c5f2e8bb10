"""Edits of bytes, and of what stands under a file's name."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from struct import pack

_WORDS = tuple(
    pack(form, value)
    for form, value in (
        ("<B", 0), ("<B", 255), ("<B", 128), ("<H", 65535), ("<I", 2**32 - 1), ("<I", 2**31),
        ("<I", 0), ("<Q", 2**64 - 1), ("<Q", 2**63), ("<Q", 2**40), ("<Q", 0), ("<Q", 1 << 32),
        ("<f", float("nan")), ("<f", float("inf")), ("<f", -1e30), ("<d", float("nan")),
        ("<e", float("inf")), ("<H", 0x7F80), ("<H", 0x7F00), ("<q", -1), ("<i", -1), ("<I", 1000),
    )
)  # fmt: skip


def edit_bytes(chance: Random, raw: bytes, head: int | None = None) -> bytes:
    """One to four edits, mostly within the first ``head`` bytes."""
    data = bytearray(raw)
    for _ in range(chance.choices((1, 2, 4), (6, 3, 1))[0]):
        size = len(data)
        limit = min(size, head) if head and chance.random() < 0.8 else size
        at = chance.randrange(limit) if limit else 0
        what = chance.choice(("flip", "set", "word", "word", "insert", "remove", "cut", "splice"))
        if what == "flip" and data:
            data[at] ^= 1 << chance.randrange(8)
        elif what == "set" and data:
            data[at] = chance.randrange(256)
        elif what == "word":
            word = chance.choice(_WORDS)
            data[at : at + len(word)] = word
        elif what == "insert":
            data[at:at] = chance.choice(_WORDS) if chance.random() < 0.5 else b"\0"
        elif what == "remove":
            del data[at : at + chance.choice((1, 2, 4, 8, 100))]
        elif what == "cut":
            del data[chance.choice((at, max(0, size - chance.randrange(1, 65)))) :]
        elif data:
            other, count = chance.randrange(size), chance.choice((4, 8, 16, 64))
            data[at : at + count] = data[other : other + count]
    return bytes(data)


def spoil_file(chance: Random, path: Path) -> str:
    """Put something else in a file's place; what. Nothing outside of the trial is touched."""
    what = chance.choice((
        "empty", "folder", "pipe", "loop", "nowhere", "zero", "null", "socket", "holes", "half",
        "link", "gone", "secret", "long", "parent",
    ))  # fmt: skip
    raw = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        return "kept"
    path.unlink(missing_ok=True)
    if what == "empty":
        path.write_bytes(b"")
    elif what == "folder":
        path.mkdir()
        (path / path.name).write_bytes(raw)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "nowhere":
        path.symlink_to("/nonexistent/file")
    elif what in ("zero", "null"):
        path.symlink_to(f"/dev/{what}")
    elif what == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            kept = Path.cwd()
            os.chdir(path.parent)
            try:
                made.bind(path.name)
            finally:
                os.chdir(kept)
    elif what == "holes":
        path.write_bytes(raw)
        os.truncate(path, chance.choice((len(raw) + 4096, 20 << 20, 200 << 20)))
    elif what == "half":
        path.write_bytes(raw[: len(raw) // 2])
    elif what == "link":
        aside = path.with_name(f"aside-{path.name}")
        aside.write_bytes(raw)
        path.symlink_to(aside)
    elif what == "secret":
        path.symlink_to("/etc/shadow")
    elif what == "long":
        path.write_bytes(raw + b"\0" * 100_000)
    elif what == "parent":
        path.symlink_to("..")
    return what
