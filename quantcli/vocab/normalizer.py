"""The ``normalizer`` of ``tokenizer.json`` as a flat list of what is done to text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantcli.types import MetaValue, boolean


def normalizer_parts(node: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The components of ``node`` in order, nested sequences unfolded."""
    if not node:
        return
    if node.get("type") == "Sequence":
        for part in node.get("normalizers") or ():
            yield from normalizer_parts(part)
    else:
        yield node


def normalizer_key_values(node: Mapping[str, Any] | None) -> dict[str, MetaValue]:
    """What llama.cpp has a key for: lowercasing and stripping accents."""
    result: dict[str, MetaValue] = {}
    for part in normalizer_parts(node):
        kind = part.get("type")
        if kind == "Lowercase":
            result["tokenizer.ggml.normalizer.lowercase"] = boolean(True)
        elif kind == "StripAccents":
            result["tokenizer.ggml.normalizer.strip_accents"] = boolean(True)
    return result
