"""How a ``tokenizer.json`` of the SentencePiece kind writes spaces, and what else it normalizes.

The same is said in several ways: Llama 2 prepends and replaces in the normalizer, Mistral and
transformers 5 use ``Metaspace``, Gemma only replaces (with a split at spaces that no longer finds
any), T5 adds the precompiled normalization of its model. Two of them differ from llama.cpp at one
place: ``Metaspace`` puts no space before text that begins with one, and with ``first`` none after
a special token; llama.cpp does both, as SentencePiece does.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.vocab.added import SPACE
from quantcli.vocab.files import TokenizerJson
from quantcli.vocab.normalizer import normalizer_parts


@dataclass(frozen=True, slots=True)
class Spaces:
    """What happens to spaces.

    ``escaped``: they become ▁; ``prefix``: text gets one in front; ``merged``: runs become one;
    ``trimmed``: those at the end go; ``white``: all white space counts as spaces; ``split``: no
    piece reaches over one; ``other``: components that llama.cpp does not have.
    """

    escaped: bool = False
    prefix: bool = False
    merged: bool = False
    trimmed: bool = False
    white: bool = False
    split: bool = False
    charsmap: bytes = b""
    other: tuple[str, ...] = ()


def read_spaces(tokenizer: TokenizerJson, file: str) -> Spaces:
    """What the normalizer and the pre-tokenizer of ``tokenizer`` do to text."""
    escaped = prefix = merged = split = stripped = white = False
    charsmap = b""
    other: list[str] = []
    for part in normalizer_parts(tokenizer.normalizer):
        kind = part.get("type")
        if kind == "Prepend" and part.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and _replaces(part, {"String": " "}, SPACE):
            escaped = True
        elif kind == "Replace" and (
            _replaces(part, {"Regex": " {2,}"}, " ") or _replaces(part, {"Regex": " {2,}"}, SPACE)
        ):
            merged = True
        elif kind == "Precompiled":
            charsmap = _decode(part.get("precompiled_charsmap"), file)
        elif kind == "Strip":
            stripped = True
        elif kind != "NFC":
            other.append(str(kind))
    for part in _pre_tokenizers(tokenizer.pre_tokenizer):
        kind = part.get("type")
        if kind == "Metaspace" and part.get("replacement") == SPACE:
            escaped = True
            scheme = part.get("prepend_scheme")
            prefix = prefix or (
                bool(part.get("add_prefix_space", True)) if scheme is None else scheme != "never"
            )
            split = split or bool(part.get("split", True))
        elif kind == "WhitespaceSplit":
            merged = split = white = True
        elif not (kind == "Split" and escaped and _is_space(part.get("pattern"))):
            other.append(str(kind))
    if stripped and not merged:
        other.append("Strip")
    return Spaces(escaped, prefix, merged, stripped or white, white, split, charsmap, tuple(other))


def prefix_scheme(tokenizer: TokenizerJson) -> str | None:
    """``prepend_scheme`` of the pre-tokenizer ``Metaspace``; None where there is none."""
    for part in _pre_tokenizers(tokenizer.pre_tokenizer):
        if part.get("type") == "Metaspace":
            scheme = part.get("prepend_scheme")
            return None if scheme is None else str(scheme)
    return None


def _replaces(part: Mapping[str, Any], pattern: Mapping[str, str], content: str) -> bool:
    return part.get("pattern") == pattern and part.get("content") == content


def _is_space(pattern: Any) -> bool:
    return pattern in ({"String": " "}, {"Regex": " "})


def _pre_tokenizers(node: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    if not node:
        return
    if node.get("type") == "Sequence":
        for part in node.get("pretokenizers") or ():
            yield from _pre_tokenizers(part)
    else:
        yield node


def _decode(value: Any, file: str) -> bytes:
    try:
        return base64.b64decode(value or "", validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise VocabularyError(f"{file}: precompiled_charsmap is not base64: {error}") from error
