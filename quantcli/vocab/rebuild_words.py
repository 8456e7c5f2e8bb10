"""A WordPiece tokenizer out of a GGUF: its words with ▁ and the pieces inside of them.

llama.cpp marks the beginnings of words where BERT marks the pieces after them with ##. It always
puts the first token ([CLS]) before a text and the separator behind it; the ids that a file leaves
out are those of BERT's first vocabulary. Source: ``llm_tokenizer_wpm_session`` and
``llama_vocab::impl::load`` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.errors import VocabularyError
from quantcli.vocab.added import SPACE
from quantcli.vocab.gguf_vocabulary import HINT, GgufVocabulary
from quantcli.vocab.special import KEYS
from quantcli.vocab.tokens import TokenType

_INSIDE = "##"
_USUAL = {"bos": 101, "sep": 102, "unk": 100}


def word_parts(vocab: GgufVocabulary) -> tuple[dict[str, Any], list[str]]:
    """``model``, ``normalizer``, ``pre_tokenizer`` and ``decoder``, and no remarks."""
    lowercase = bool(vocab.keys.get("normalizer.lowercase", True))
    strip = bool(vocab.keys.get("normalizer.strip_accents", lowercase))
    pieces: dict[str, int] = {}
    for number, (text, kind) in enumerate(zip(vocab.tokens, vocab.kinds, strict=True)):
        if kind == TokenType.UNUSED:
            continue
        if kind == TokenType.NORMAL:
            word = text.startswith(SPACE) and text != SPACE
            text = text.removeprefix(SPACE) if word else _INSIDE + text
        if text in pieces:
            raise VocabularyError(
                f"{vocab.file}: tokens {pieces[text]} and {number} are both {text!r}", hint=HINT
            )
        pieces[text] = number
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": strip,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": _INSIDE, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": word_token(vocab, "unk"),
            "continuing_subword_prefix": _INSIDE,
            "max_input_chars_per_word": 100,
            "vocab": pieces,
        },
    }, []


def word_token(vocab: GgufVocabulary, role: str) -> str:
    """The text of the token that llama.cpp takes for a role: "bos" ([CLS]), "sep" or "unk"."""
    number = vocab.keys.get(KEYS[role], _USUAL[role])
    if not isinstance(number, int) or not 0 <= number < len(vocab.tokens):
        raise VocabularyError(
            f"{vocab.file}: the {role} token is {number!r}, which is none of the "
            f"{len(vocab.tokens)} tokens",
            hint=HINT,
        )
    return vocab.tokens[number]
