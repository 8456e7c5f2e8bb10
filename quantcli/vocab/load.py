"""Which kind of tokenizer a folder has, and its key-values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue, text
from quantcli.vocab.added import added_tokens, name_by_stripping
from quantcli.vocab.byte_bpe import byte_bpe_key_values, is_byte_level
from quantcli.vocab.differences import find_differences
from quantcli.vocab.files import TokenizerFiles, TokenizerJson
from quantcli.vocab.find_files import find_files
from quantcli.vocab.template import template_key_values
from quantcli.vocab.whitespace import read_spaces


def load_vocabulary(
    folder: Path,
    config: Mapping[str, Any],
    *,
    vocab_size: int,
    pre: str | None = None,
    name: str | None = None,
    template: str | None = None,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, MetaValue]:
    """Every ``tokenizer.*`` key-value for the checkpoint in ``folder``.

    ``config`` is its config.json, ``vocab_size`` the number of rows of the embedding table: the
    token list is filled up to it. ``pre`` names llama.cpp's pre-tokenizer instead of recognising
    it, and takes llama.cpp's way where the tokenizer does more than llama.cpp. ``name`` is the
    model's, which comes back as ``general.name``, since llama.cpp looks in it for Phi-3's way with
    spaces. ``template`` takes the place of the folder's chat template. ``on_note`` takes a sentence
    for each setting that a GGUF has no place for. VocabularyError says what is missing, broken or
    not supported; UsageError that there is no such ``pre``.
    """
    files = replace(find_files(folder, config), template=template)
    kind = None if files.tokenizer is None else _kind(files, files.tokenizer, pre)
    if files.tokenizer is not None and kind == "byte-level":
        keys = byte_bpe_key_values(files, files.tokenizer, vocab_size, pre)
    elif files.tokenizer is not None and kind == "WordPiece":
        from quantcli.vocab.wordpiece import wordpiece_key_values

        keys = wordpiece_key_values(files, files.tokenizer, vocab_size, pre)
    else:
        from quantcli.vocab.sentencepiece import sentencepiece_key_values

        keys = sentencepiece_key_values(files, vocab_size, pre)
    keys |= template_key_values(files)
    if name is not None:
        keys["general.name"] = text(name_by_stripping(name, added_tokens(files).values()))
    if on_note is not None:
        for sentence in find_differences(files, keys):
            on_note(sentence)
    return keys


def _kind(files: TokenizerFiles, tokenizer: TokenizerJson, pre: str | None) -> str:
    name = files.path(tokenizer.file)
    kind = tokenizer.model.type or _untyped(tokenizer)
    if kind == "WordPiece":
        return kind
    if kind not in ("BPE", "Unigram"):
        raise VocabularyError(
            f"{name}: the model is {kind}; llama.cpp has BPE, Unigram and WordPiece"
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
    return "BPE" if tokenizer.model.merges else "WordPiece"
