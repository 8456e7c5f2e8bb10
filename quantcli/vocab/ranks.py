"""Vocabularies that are ranks of byte strings: Mistral's tekken.json and OpenAI's tiktoken files.

Such a BPE joins the neighbours whose joint bytes have the lowest rank. As a list of merges that is
every pair of tokens that makes a token, in the order of the ranks, with words that are tokens taken
whole. Ids are ranks in a tiktoken file; in tekken.json the special tokens stand before them.
tekken.json holds its own expression for words; for a tiktoken file ``--pre`` has to say it, where
the class in tokenizer_config.json is not known. Sources: mistral-common's tekken.py, tiktoken's
load.py.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from quantcli.errors import VocabularyError
from quantcli.vocab.files import AddedToken, ModelPart, TokenizerJson, read_json
from quantcli.whole_files import read_whole

_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
)  # fmt: skip
"""The special tokens of tekken.json files from before they were listed in it."""
_SPLITTERS = {"TikTokenTokenizer": "kimi-k2", "QWenTokenizer": "qwen2"}
"""llama.cpp's name for how a tokenizer's class splits words."""


class _Token(msgspec.Struct, frozen=True):
    rank: int
    token_bytes: str


class _Special(msgspec.Struct, frozen=True):
    rank: int
    token_str: str


class _Settings(msgspec.Struct, frozen=True):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int


class _Tekken(msgspec.Struct, frozen=True):
    config: _Settings
    vocab: list[_Token]
    special_tokens: list[_Special] | None = None


def read_tekken(path: Path) -> TokenizerJson:
    """tekken.json as the ``tokenizer.json`` that gives the same ids."""
    found = read_json(path, _Tekken)
    first = found.config.default_num_special_tokens
    count = found.config.default_vocab_size - first
    if first < 0 or not 0 < count <= len(found.vocab):
        raise VocabularyError(
            f"{path}: {len(found.vocab)} tokens cannot fill a vocabulary of "
            f"{found.config.default_vocab_size} with {first} special tokens"
        )
    named = found.special_tokens or [_Special(i, text) for i, text in enumerate(_SPECIAL)]
    special = {token.rank: token.token_str for token in named}
    texts = [special.get(number, f"<SPECIAL_{number}>") for number in range(first)]
    words = [_decode(token.token_bytes, path, token.rank) for token in found.vocab[:count]]
    vocab = {text: number for number, text in enumerate(texts)}
    splitter = {"Regex": found.config.pattern}
    around = [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]
    return TokenizerJson(
        _model(words, vocab, first, path),
        [AddedToken(number, text, True, False) for number, text in enumerate(texts)],
        None,
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": splitter, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        {"type": "TemplateProcessing", "single": around} if "<s>" in vocab else None,
        path.name,
    )


def tekken_names(tokenizer: TokenizerJson) -> dict[str, str]:
    """What tokenizer_config.json would name: the special tokens by their role."""
    texts = {token.content for token in tokenizer.added_tokens or ()}
    roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
    return {f"{role}_token": text for role, text in roles.items() if text in texts}


def read_tiktoken(path: Path, settings: Mapping[str, Any]) -> TokenizerJson:
    """A tiktoken file, whose special tokens ``settings`` (tokenizer_config.json) has."""
    words: list[bytes] = []
    try:
        raw = read_whole(path)
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(raw.splitlines()):
        word, _, rank = line.partition(b" ")
        if not line.strip():
            continue
        if rank.strip() != str(len(words)).encode():
            raise VocabularyError(f"{path}: line {number + 1} is not a token and rank {len(words)}")
        words.append(_decode(word.decode("ascii", "replace"), path, len(words)))
    if not words:
        raise VocabularyError(f"{path} has no tokens")
    return TokenizerJson(
        _model(words, {}, 0, path),
        None,
        None,
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        None,
        path.name,
        _SPLITTERS.get(str(settings.get("tokenizer_class"))),
    )


def _decode(word: str, path: Path, rank: int) -> bytes:
    try:
        return base64.b64decode(word, validate=True)
    except (binascii.Error, ValueError):
        raise VocabularyError(f"{path}: token {rank} is not base64: {word[:40]!r}") from None


def _model(words: Sequence[bytes], vocab: dict[str, int], first: int, path: Path) -> ModelPart:
    """The BPE model of ``words``, the token with rank r having the id ``first`` + r."""
    ranks = {word: rank for rank, word in enumerate(words)}
    if len(ranks) < len(words) or b"" in ranks:
        raise VocabularyError(f"{path}: a token is empty or there twice")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise VocabularyError(f"{path}: the byte {missing} has no token")
    alphabet = _alphabet()
    texts = ["".join(alphabet[byte] for byte in word) for word in words]
    for rank, text in enumerate(texts):
        if text in vocab:
            raise VocabularyError(f"{path}: token {rank} is the special token {text!r} too")
        vocab[text] = first + rank
    merges: list[str | tuple[str, str]] = []
    for word, text in zip(words, texts, strict=True):
        pairs = [
            (ranks[word[:cut]], ranks[word[cut:]], cut)
            for cut in range(1, len(word))
            if word[:cut] in ranks and word[cut:] in ranks
        ]
        merges += [(text[:cut], text[cut:]) for _, _, cut in sorted(pairs)]
    return ModelPart(vocab, "BPE", merges, ignore_merges=True)


def _alphabet() -> list[str]:
    """GPT-2's character for each byte: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
