"""The constants of the GGUF container, shared by the reader and the writer.

Source: ggml's gguf.h (GGUF_MAGIC, GGUF_VERSION, enum gguf_type) and docs/gguf.md. Version 2 and 3
have the same little-endian layout; version 1 had 32-bit counts and is long gone.
"""

from __future__ import annotations

MAGIC = b"GGUF"
VERSION = 3
READABLE_VERSIONS = (2, 3)

DEFAULT_ALIGNMENT = 32
SPLIT_ID = "quantcli.split.id"
"""In each file of a set: what tells the sets of two runs apart."""
ALIGNMENT_KEY = "general.alignment"

MAX_KEY_BYTES = 2**16 - 1
MAX_NAME_BYTES = 63
"""ggml keeps tensor names in 64 bytes, the last of them a zero."""
MAX_DIMENSIONS = 4

VALUE_CODES: dict[str, int] = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5,
    "f32": 6, "bool": 7, "str": 8, "u64": 10, "i64": 11, "f64": 12,
}  # fmt: skip
"""Kind of a key-value (as `quantcli.types.MetaValue` names it) -> code in the file."""

ARRAY_CODE = 9

VALUE_KINDS: dict[int, str] = {code: kind for kind, code in VALUE_CODES.items()}
"""Code in the file -> kind; an array's code is not among them."""

SCALAR_STRUCTS: dict[str, str] = {
    "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i",
    "f32": "f", "bool": "B", "u64": "Q", "i64": "q", "f64": "d",
}  # fmt: skip
"""Kind -> ``struct`` character (little-endian, so with "<" before it); strings have none."""


def padded(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment
