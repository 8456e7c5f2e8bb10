"""The token list of a GGUF, out of its ``tokenizer.ggml.*`` key-values.

Refused: a GGUF without a tokenizer, arrays of another kind or length, tokens that are not UTF-8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue
from quantcli.vocab.special import KEYS
from quantcli.vocab.tokens import TokenType

_PREFIX = "tokenizer.ggml."
_ARRAYS = {
    "tokens": ("[str]",),
    "token_type": ("[i32]", "[u32]", "[i64]", "[u64]"),
    "scores": ("[f32]", "[f64]"),
    "merges": ("[str]",),
    "precompiled_charsmap": ("[u8]", "[i8]"),
}
HINT = "--tokenizer FOLDER takes the files from the checkpoint that the GGUF was made from"


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The token list of a GGUF, and its other ``tokenizer.ggml.*`` key-values by short name."""

    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    keys: Mapping[str, Any]
    file: str

    def token(self, role: str) -> str | None:
        """The text of a special token by its role ("bos" ...), where the file names one."""
        number = self.keys.get(KEYS[role])
        if not isinstance(number, int) or not 0 <= number < len(self.tokens):
            return None
        return self.tokens[number]

    def ids(self) -> dict[str, int]:
        """Id by text, without the rows that no token uses."""
        kinds = zip(self.tokens, self.kinds, strict=True)
        return {
            text: number for number, (text, kind) in enumerate(kinds) if kind != TokenType.UNUSED
        }


def read_gguf_vocabulary(metadata: Mapping[str, MetaValue], file: str) -> GgufVocabulary:
    """The token list; VocabularyError where there is none or its arrays do not fit together."""
    for name, allowed in _ARRAYS.items():
        found = metadata.get(_PREFIX + name)
        if found is not None and found.kind not in allowed:
            raise VocabularyError(
                f"{file}: {_PREFIX}{name} is of kind {found.kind}; {allowed[0]} belongs there"
            )
    keys = {
        key.removeprefix(_PREFIX): value.value
        for key, value in metadata.items()
        if key.startswith(_PREFIX)
    }
    tokens = keys.pop("tokens", None)
    if not tokens or keys.get("model") in (None, "none", "no_vocab"):
        raise VocabularyError(f"{file} has no tokenizer", hint=HINT)
    broken = next((number for number, text in enumerate(tokens) if isinstance(text, bytes)), None)
    if broken is not None:
        raise VocabularyError(f"{file}: token {broken} is not UTF-8: {tokens[broken]!r}", hint=HINT)
    kinds = keys.pop("token_type", None) or [TokenType.NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise VocabularyError(f"{file}: {len(tokens)} tokens but {len(kinds)} token types")
    return GgufVocabulary(tuple(tokens), tuple(map(int, kinds)), keys, file)
