"""Which kind of tokenizer a folder has, and its key-values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue
from quantcli.vocab.byte_bpe import byte_bpe_key_values, is_byte_level
from quantcli.vocab.files import TokenizerFiles, TokenizerJson, read_files
from quantcli.vocab.sentencepiece import sentencepiece_key_values
from quantcli.vocab.template import template_key_values
from quantcli.vocab.whitespace import read_spaces


def load_vocabulary(
    folder: Path, config: Mapping[str, Any], *, vocab_size: int, pre: str | None = None
) -> dict[str, MetaValue]:
    """Every ``tokenizer.*`` key-value for the checkpoint in ``folder``.

    ``config`` is its config.json, ``vocab_size`` the number of rows of the embedding table: the
    token list is filled up to it. ``pre`` names llama.cpp's pre-tokenizer instead of recognising
    it, and takes llama.cpp's way where the tokenizer does more than llama.cpp. VocabularyError
    says what is missing, broken or not supported; UsageError that there is no such ``pre``.
    """
    files = read_files(folder, config)
    if files.tokenizer is not None and _kind(files, files.tokenizer, pre) == "byte-level":
        keys = byte_bpe_key_values(files, files.tokenizer, vocab_size, pre)
    else:
        keys = sentencepiece_key_values(files, vocab_size, pre)
    return keys | template_key_values(files)


def _kind(files: TokenizerFiles, tokenizer: TokenizerJson, pre: str | None) -> str:
    name = files.path("tokenizer.json")
    kind = tokenizer.model.type or _untyped(tokenizer)
    if kind not in ("BPE", "Unigram"):
        raise VocabularyError(
            f"{name}: the model is {kind}; llama.cpp runs language models with BPE and Unigram"
        )
    if kind == "BPE" and is_byte_level(tokenizer):
        return "byte-level"
    if read_spaces(tokenizer, name).escaped:
        return "sentencepiece"
    if kind == "BPE" and pre is not None:
        return "byte-level"
    raise VocabularyError(
        f"{name}: neither a byte-level tokenizer (no ByteLevel in the pre_tokenizer) nor of the "
        "SentencePiece kind (nothing writes ▁ for a space)"
    )


def _untyped(tokenizer: TokenizerJson) -> str:
    """The model's type in files from before it was written."""
    if isinstance(tokenizer.model.vocab, list):
        return "Unigram"
    return "BPE" if tokenizer.model.merges else "WordPiece or WordLevel"
