"""``KEY=TYPE:VALUE``: key-values that a user sets by hand, as ``--override-kv`` takes them.

Types are int, float, bool (true or false) and str; ``str:@FILE`` takes the text of a file. A key
has at most 127 bytes, llama.cpp's limit. Floats are stored as f32. An integer keeps the type that
the model's own key-value has, if it fits; otherwise it becomes u32, i32 when negative, or the
64-bit type when it needs one. (llama-quantize stores the absolute value as u32, whatever the sign.)
Keys that say how to read the file itself are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from quantcli.errors import UsageError
from quantcli.plan.text_file import read_text
from quantcli.types import MetaValue, boolean, f32, text

_MOST_BYTES = 127
_BOOLEANS = {"true": True, "false": False}
_INTEGERS = {
    "u8": (0, 2**8 - 1), "i8": (-(2**7), 2**7 - 1),
    "u16": (0, 2**16 - 1), "i16": (-(2**15), 2**15 - 1),
    "u32": (0, 2**32 - 1), "i32": (-(2**31), 2**31 - 1),
    "u64": (0, 2**64 - 1), "i64": (-(2**63), 2**63 - 1),
}  # fmt: skip
_PREFERRED = ("u32", "i32", "u64", "i64")
_RESERVED = ("general.alignment", "general.quantization_version", "split.", "quantcli.")


def resolve_overrides(
    entries: Iterable[str], metadata: Mapping[str, MetaValue]
) -> dict[str, MetaValue]:
    """The key-values that ``entries`` set; of two for one key the later counts.

    Raises UsageError for an entry that is malformed, too long or names a reserved key.
    """
    found = {}
    for entry in entries:
        key, kind, value = split_override(entry)
        found[key] = _convert(entry, kind, value, metadata.get(key))
    return found


def split_override(entry: str) -> tuple[str, str, str]:
    """Key, type and value of ``KEY=TYPE:VALUE``, not yet converted; UsageError if malformed."""
    key, equals, rest = entry.partition("=")
    kind, colon, value = rest.partition(":")
    if not key or not equals or not colon or kind not in ("int", "float", "bool", "str"):
        raise UsageError(
            f"{entry!r} is not KEY=TYPE:VALUE with a type of int, float, bool or str",
            hint="for example: --override-kv llama.context_length=int:8192",
        )
    if len(key.encode()) > _MOST_BYTES:
        raise UsageError(f"--override-kv: a key has at most {_MOST_BYTES} bytes: {key!r}")
    if key.startswith(_RESERVED):
        raise UsageError(f"--override-kv: {key} says how the file is laid out and cannot be set")
    return key, kind, value


def _convert(entry: str, kind: str, value: str, existing: MetaValue | None) -> MetaValue:
    if kind == "bool":
        if value not in _BOOLEANS:
            raise UsageError(f"--override-kv {entry!r}: a bool is true or false")
        return boolean(_BOOLEANS[value])
    if kind == "str":
        return text(read_text(value[1:], "--override-kv") if value.startswith("@") else value)
    try:
        number = int(value) if kind == "int" else float(value)
    except ValueError:
        raise UsageError(f"--override-kv {entry!r}: {value!r} is not of type {kind}") from None
    if isinstance(number, float):
        if not math.isfinite(number):
            raise UsageError(f"--override-kv {entry!r}: a float must be finite")
        return f32(number)
    kinds = _PREFERRED if existing is None else (existing.kind, *_PREFERRED)
    for each in kinds:
        low, high = _INTEGERS.get(each, (1, 0))
        if low <= number <= high:
            return MetaValue(each, number)
    raise UsageError(f"--override-kv {entry!r}: the integer does not fit in 64 bits")
