"""tekken.json and tiktoken files against the tokenizer.json of the same vocabulary."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers_build import train_byte_level, write_folder
from support.tokenizers_llama import LlamaVocabulary
from support.tokenizers_structures import STRUCTURES
from support.tokenizers_text import PAGE

from quantcli.errors import VocabularyError
from quantcli.vocab import load_vocabulary, regexes
from quantcli.vocab.byte_bpe import ALPHABET

SPECIALS, WORDS = 20, 1500
MARKS = {"hindi", "thai", "combining", "capital after small"}
"""What llama.cpp's own splitter for tekken cuts otherwise."""


@cache
def _trained(name: str) -> str:
    return json.dumps(train_byte_level(STRUCTURES[name], size=1800, ignore_merges=True))


def words_of(tokenizer: dict[str, Any]) -> list[bytes]:
    """The trained tokens as bytes, single bytes first, then in the order of the merges."""
    letters = sorted(ALPHABET, key=lambda c: (not (0x21 <= ord(c) <= 0xFF), ord(c)))
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    codes = {chr(byte): byte for byte in plain}
    codes |= {chr(0x100 + number): byte for number, byte in enumerate(others)}
    assert set(codes) == set(letters)
    merged = ["".join(pair) for pair in tokenizer["model"]["merges"]]
    made = [bytes(codes[c] for c in text) for text in dict.fromkeys(merged)]
    return [*(bytes([byte]) for byte in range(256)), *made][:WORDS]


def tekken(words: list[bytes], **changes: Any) -> dict[str, Any]:
    return {
        "config": {
            "pattern": regexes.TEKKEN,
            "num_vocab_tokens": len(words) + 50,
            "default_vocab_size": SPECIALS + len(words),
            "default_num_special_tokens": SPECIALS,
            "version": "v3",
            **changes,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for rank, word in enumerate([*words, *(b"unused %d" % i for i in range(50))])
        ],
    }


def tiktoken(words: list[bytes]) -> bytes:
    lines = (base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words))
    return b"".join(lines)


def cut(tokenizer: dict[str, Any], count: int) -> dict[str, Any]:
    """The trained tokenizer with as many merges as ``count`` tokens need."""
    words = words_of(tokenizer)[:count]
    merges = tokenizer["model"]["merges"][: count - 256]
    kept = {"".join(pair) for pair in merges} | set(ALPHABET)
    vocab = {text: n for n, text in enumerate(sorted(kept))}
    assert len(vocab) == len(words)
    model = tokenizer["model"] | {"vocab": vocab, "merges": merges}
    return tokenizer | {"model": model, "added_tokens": []}


def test_tekken_gives_the_ids_of_its_ranks(tmp_path: Path) -> None:
    trained = json.loads(_trained("tekken"))
    words = words_of(trained)
    folder = write_folder(tmp_path / "m", tekken=tekken(words))
    keys = load_vocabulary(folder, {}, vocab_size=SPECIALS + len(words))
    assert keys["tokenizer.ggml.pre"].value == "tekken"
    assert keys["tokenizer.ggml.bos_token_id"].value == 1
    assert keys["tokenizer.ggml.eos_token_id"].value == 2
    assert keys["tokenizer.ggml.add_bos_token"].value is True
    assert keys["tokenizer.ggml.add_eos_token"].value is False
    vocabulary = LlamaVocabulary(keys, tmp_path / "v.gguf")
    same = cut(trained, len(words))
    different = set()
    for key, text in PAGE.items():
        found = [vocabulary.decode([number]) for number in vocabulary.encode(text)]
        wanted = [words[number] for number in _ranks(same, words, text)]
        if found != wanted:
            different.add(key)
    assert different <= MARKS
    assert vocabulary.encode("[INST]")[0] == 3
    assert vocabulary.encode("a", add_special=True)[0] == 1


def _ranks(tokenizer: dict[str, Any], words: list[bytes], text: str) -> list[int]:
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(json.dumps(tokenizer))
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    codes = {chr(byte): byte for byte in plain}
    codes |= {chr(0x100 + number): byte for number, byte in enumerate(others)}
    ranks = {word: rank for rank, word in enumerate(words)}
    return [ranks[bytes(codes[c] for c in token)] for token in library.encode(text).tokens]


@pytest.mark.parametrize("file", ["tiktoken__model", "tokenizer__model", "qwen__tiktoken"])
def test_tiktoken_files(file: str, tmp_path: Path) -> None:
    trained = json.loads(_trained("llama-bpe"))
    words = words_of(trained)
    config = {"added_tokens_decoder": {str(len(words)): {"content": "<|end|>", "special": True}}}
    folder = write_folder(tmp_path / "m", tokenizer_config=config, **{file: tiktoken(words)})
    with pytest.raises(VocabularyError, match="does not say how words are split") as caught:
        load_vocabulary(folder, {}, vocab_size=len(words) + 1)
    assert "--pre" in str(caught.value.hint)
    keys = load_vocabulary(folder, {}, vocab_size=len(words) + 1, pre="llama-bpe")
    vocabulary = LlamaVocabulary(keys, tmp_path / "v.gguf")
    same = cut(trained, len(words))
    for text in PAGE.values():
        assert vocabulary.encode(text) == _ranks(same, words, text)
    assert vocabulary.encode("<|end|>") == [len(words)]


def test_a_known_class_says_how_words_are_split(tmp_path: Path) -> None:
    words = words_of(json.loads(_trained("llama-bpe")))
    folder = write_folder(
        tmp_path,
        tiktoken__model=tiktoken(words),
        tokenizer_config={"tokenizer_class": "TikTokenTokenizer"},
    )
    keys = load_vocabulary(folder, {}, vocab_size=len(words))
    assert keys["tokenizer.ggml.pre"].value == "kimi-k2"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"config": {}}, "has not the form"),
        (tekken([b"a"]), "the byte 0 has no token"),
        (tekken([b"a"], default_vocab_size=900), "cannot fill a vocabulary of 900"),
        (tekken([b"a", b"a"]), "empty or there twice"),
    ],
)
def test_broken_tekken_files(content: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tekken=content)
    with pytest.raises(VocabularyError, match=rf"tekken\.json.*{sentence}"):
        load_vocabulary(folder, {}, vocab_size=900)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"YQ== 1\n", "line 1 is not a token and rank 0"),
        (b"?? 0\n", "token 0 is not base64"),
        (b"\n", "has no tokens"),
    ],
)
def test_broken_tiktoken_files(content: bytes, sentence: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tiktoken__model=content)
    with pytest.raises(VocabularyError, match=sentence):
        load_vocabulary(folder, {}, vocab_size=900, pre="llama-bpe")
