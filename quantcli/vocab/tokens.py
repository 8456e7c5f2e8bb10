"""The token list of a GGUF: one text, type and score for each row of the embedding table.

llama.cpp looks tokens up by text and ends the process when two have the same (``GGML_ASSERT`` in
llama_vocab::impl::load), so the list is checked here. Rows without a token are filled with
``[PAD<id>]``, type UNUSED, as llama.cpp's converter does.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue, array


class TokenType(IntEnum):
    """Token types of GGUF, which are those of SentencePiece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


PAD_SCORE = -10000.0
ADDED_SCORE = -1000.0
"""Scores of tokens that a SentencePiece model does not score: below every piece of its own."""


class TokenList:
    """Tokens by id, ``size`` of them in the end; ``file`` is named in errors."""

    def __init__(self, size: int, file: str) -> None:
        self.size = size
        self.file = file
        self._texts: list[str | None] = [None] * size
        self._types = [TokenType.UNUSED] * size
        self._scores = [PAD_SCORE] * size

    def put(self, token: int, text: str, kind: TokenType, score: float = 0.0) -> None:
        """Set the token with that id, over one that was there."""
        self._texts[token] = text
        self._types[token] = kind
        self._scores[token] = score

    def text(self, token: int) -> str | None:
        """The token's text; None where nothing was put or the id lies outside the table."""
        return self._texts[token] if 0 <= token < self.size else None

    def kind(self, token: int) -> TokenType:
        """The token's type."""
        return self._types[token]

    def ids(self) -> dict[str, int]:
        """Id by text."""
        return {text: token for token, text in enumerate(self._texts) if text is not None}

    def key_values(self, *, scores: bool) -> dict[str, MetaValue]:
        """The list as key-values; VocabularyError where two tokens have the same text."""
        texts: list[Any] = []
        seen: dict[str, int] = {}
        for token, text in enumerate(self._texts):
            if text is None:
                text = f"[PAD{token}]"
            # llama.cpp reads C strings, and gives a token without text a name of its own.
            known = text.partition("\0")[0] or f"[EMPTY_{token}]"
            if known in seen:
                raise VocabularyError(
                    f"{self.file}: tokens {seen[known]} and {token} are both {known!r} for "
                    "llama.cpp, which tells tokens apart by their text up to a NUL"
                )
            seen[known] = token
            texts.append(text)
        result = {"tokenizer.ggml.tokens": array("str", texts)}
        if scores:
            result["tokenizer.ggml.scores"] = array("f32", self._scores)
        result["tokenizer.ggml.token_type"] = array("i32", [int(kind) for kind in self._types])
        return result


def check_size(highest: int, size: int, file: str) -> None:
    """Refuse a vocabulary whose highest id has no row in an embedding table of ``size`` rows."""
    if highest >= size:
        raise VocabularyError(
            f"{file} has tokens up to id {highest}, so {highest + 1} rows are needed, but the "
            f"model's vocab_size is {size}",
            hint="the tokenizer belongs to another model, or was extended without the weights",
        )
