"""Byte-level BPE out of a GGUF: tokens and merges as they stand, the splits behind the name.

``tokenizer.ggml.pre`` names regexes that llama.cpp holds in its code; the table of
`quantcli.vocab.pretokenizers` has the structure of ``tokenizer.json`` for each. Under "sarvam-moe",
and in the tokenizer "gemma4", merges run on plain text with ▁ for spaces, and bytes have tokens.
"""

from __future__ import annotations

from typing import Any

from quantcli.errors import VocabularyError
from quantcli.vocab import regexes
from quantcli.vocab.added import SPACE
from quantcli.vocab.gguf_vocabulary import GgufVocabulary
from quantcli.vocab.pretokenizer_steps import BYTES, read_steps, split
from quantcli.vocab.pretokenizers import TABLE, PreTokenizer

_HINT = "--tokenizer FOLDER takes the files from the checkpoint that the GGUF was made from"
_BEHAVIORS = {"isolated": "Isolated", "mergedwithnext": "MergedWithNext"}
_ESCAPED = "sarvam-moe"


def byte_level_parts(vocab: GgufVocabulary) -> tuple[dict[str, Any], list[str]]:
    """``model``, ``normalizer``, ``pre_tokenizer`` and ``decoder``, and remarks.

    VocabularyError where llama.cpp's pre-tokenizer has no structure in the table.
    """
    name = str(vocab.keys.get("pre", "default"))
    if name == _ESCAPED:
        return escaped_parts(vocab)
    merges = _merges(vocab)
    line = next((line for line in TABLE if name in (line.name, *line.also)), None)
    if line is None:
        raise VocabularyError(
            f"{vocab.file}: how the pre-tokenizer {name!r} splits text stands in llama.cpp's code "
            "alone",
            hint=_HINT,
        )
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": line.ignore_merges,
        "vocab": vocab.ids(),
        "merges": merges,
    }
    return {
        "normalizer": _normalizer(vocab),
        "pre_tokenizer": pre_tokenizer(line),
        "decoder": _byte_level(),
        "model": model,
    }, []


def pre_tokenizer(line: PreTokenizer) -> dict[str, Any]:
    """The ``pre_tokenizer`` of tokenizer.json that takes the steps of ``line``."""
    if line.steps == (split(regexes.GPT2), BYTES):
        return _byte_level(use_regex=True)
    parts = [_byte_level() if step == BYTES else _split(step) for step in line.steps]
    node = {"type": "Sequence", "pretokenizers": parts}
    assert read_steps(node) == line.steps
    return node


def _split(step: str) -> dict[str, Any]:
    _, behavior, regex = step.split(" ", 2)
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": _BEHAVIORS[behavior],
        "invert": False,
    }


def _byte_level(*, use_regex: bool = False) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _normalizer(vocab: GgufVocabulary) -> dict[str, Any] | None:
    parts = [
        {"type": kind}
        for key, kind in (("strip_accents", "StripAccents"), ("lowercase", "Lowercase"))
        if vocab.keys.get(f"normalizer.{key}")
    ]
    return {"type": "Sequence", "normalizers": parts} if parts else None


def _pair(vocab: GgufVocabulary, place: int, merge: str | bytes) -> list[str]:
    # A token may begin with a space where its pair was written by other tools.
    text = merge if isinstance(merge, str) else ""
    left, _, right = text[1:].partition(" ")
    if not right:
        raise VocabularyError(f"{vocab.file}: merge {place} ({merge!r}) is not a pair of tokens")
    return [text[0] + left, right]


def _merges(vocab: GgufVocabulary) -> list[list[str]]:
    if not vocab.keys.get("merges"):
        raise VocabularyError(f"{vocab.file}: a BPE tokenizer without merges", hint=_HINT)
    return [_pair(vocab, place, merge) for place, merge in enumerate(vocab.keys["merges"])]


def escaped_parts(vocab: GgufVocabulary) -> tuple[dict[str, Any], list[str]]:
    """The same parts of a BPE over plain text with ▁ for spaces."""
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocab.token("unk"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab.ids(),
            "merges": _merges(vocab),
        },
    }, []
