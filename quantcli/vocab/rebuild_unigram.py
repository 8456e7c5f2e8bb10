"""A SentencePiece unigram model out of a GGUF: its pieces with their scores, as they stand.

llama.cpp normalizes with the precompiled map of the model, then writes ▁ for spaces: one before
the first word, or one before each where runs of spaces become one and those at the ends go. The
same is said here with the components of ``tokenizer.json``. Source: ``llm_tokenizer_ugm_session``
in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import base64
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.vocab.added import SPACE
from quantcli.vocab.gguf_vocabulary import GgufVocabulary
from quantcli.vocab.tokens import TokenType

_BEFORE_WORDS = r"\A(?= *[^ ])"
"""The beginning of a text that is not spaces alone."""


def unigram_parts(vocab: GgufVocabulary) -> tuple[dict[str, Any], list[str]]:
    """``model``, ``normalizer``, ``pre_tokenizer`` and ``decoder``, and no remarks."""
    scores = vocab.keys.get("scores") or []
    if len(scores) != len(vocab.tokens):
        raise VocabularyError(f"{vocab.file}: {len(vocab.tokens)} pieces but {len(scores)} scores")
    if TokenType.UNKNOWN not in vocab.kinds:
        raise VocabularyError(f"{vocab.file}: a unigram model without an unknown piece")
    prefix = bool(vocab.keys.get("add_space_prefix", True))
    merged = bool(vocab.keys.get("remove_extra_whitespaces", False))
    normalizers: list[dict[str, Any]] = []
    charsmap = bytes(value & 255 for value in vocab.keys.get("precompiled_charsmap") or ())
    if charsmap:
        encoded = base64.b64encode(charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if merged:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append(_replace({"Regex": " {2,}"}, " "))
    if prefix or merged:
        normalizers.append(_replace({"Regex": _BEFORE_WORDS}, " "))
    normalizers.append(_replace({"String": " "}, SPACE))
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "always" if prefix or merged else "never",
            "split": False,
        },
        "model": {
            "type": "Unigram",
            "unk_id": vocab.kinds.index(TokenType.UNKNOWN),
            "vocab": [
                [text, float(score)] for text, score in zip(vocab.tokens, scores, strict=True)
            ],
            "byte_fallback": False,
        },
    }, []


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
