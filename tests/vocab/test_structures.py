"""Every pre-tokenizer of the table: recognised by structure, and the ids are llama.cpp's own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers_build import (
    ADDED,
    add_template,
    byte_level,
    digits,
    encode_all,
    sequence,
    split,
    train_byte_level,
    write_folder,
)
from support.tokenizers_llama import LlamaVocabulary
from support.tokenizers_structures import DIFFERS, IGNORE_MERGES, STRUCTURES
from support.tokenizers_text import PAGE

from quantcli.errors import UsageError, VocabularyError
from quantcli.vocab import load_vocabulary, pretokenizers
from quantcli.vocab import regexes as r
from quantcli.vocab.pretokenizer_steps import read_steps

SIZE = 3010
"""Six more than the trained tokenizers have, so that every list is padded."""


@cache
def _trained(text: str, ignore_merges: bool) -> str:
    return json.dumps(train_byte_level(json.loads(text), ignore_merges=ignore_merges))


def trained(pre_tokenizer: dict[str, Any], *, ignore_merges: bool = False) -> dict[str, Any]:
    return json.loads(_trained(json.dumps(pre_tokenizer), ignore_merges))


def published(name: str) -> dict[str, Any]:
    return trained(STRUCTURES[name], ignore_merges=name in IGNORE_MERGES)


def test_every_line_of_the_table_has_a_structure_here():
    assert list(STRUCTURES) == [line.name for line in pretokenizers.TABLE]


@pytest.mark.parametrize("name", STRUCTURES)
def test_llama_cpp_gives_the_tokenizers_own_ids(name: str, tmp_path: Path):
    tokenizer = published(name)
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=SIZE)
    assert keys["tokenizer.ggml.pre"].value == name
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    wanted = encode_all(tokenizer, PAGE)
    different = {key for key, text in PAGE.items() if vocabulary.encode(text) != wanted[key]}
    assert different == set(DIFFERS.get(name, ()))


@pytest.mark.parametrize("name", STRUCTURES)
def test_added_tokens_and_template_are_kept(name: str, tmp_path: Path):
    tokenizer = published(name)
    add_template(tokenizer, first=["<|bos|>"], last=["<|eos|>"])
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    vocabulary = LlamaVocabulary(
        load_vocabulary(folder, {}, vocab_size=SIZE), tmp_path / "vocab.gguf"
    )
    texts = {
        "around": "<|user|>Hello<|eos|> <|user|> there<|bos|>\n<|user|>\n\n",
        "inside": "".join(f"a{token}b {token} c\n" for token in ADDED),
        "alone": "".join(ADDED) + "<|user|><|user|>",
        "nearly": "<|user| <tool <|bos>> snake_case_wor",
    }
    wanted = encode_all(tokenizer, texts, special=True)
    assert {key: vocabulary.encode(text, add_special=True) for key, text in texts.items()} == wanted


@pytest.mark.parametrize(
    ("name", "other"),
    [("llama-bpe", "gpt-2"), ("qwen2", "smollm"), ("gpt-2", "llama-bpe"), ("qwen35", "qwen2"),
     ("deepseek-v3", "qwen2"), ("tekken", "gpt-4o"), ("smollm", "gpt-2"), ("dbrx", "qwen2")],
)  # fmt: skip
def test_the_page_tells_pre_tokenizers_apart(name: str, other: str, tmp_path: Path):
    tokenizer = published(name)
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=SIZE, pre=other)
    assert keys["tokenizer.ggml.pre"].value == other
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    wanted = encode_all(tokenizer, PAGE)
    assert any(vocabulary.encode(text) != wanted[key] for key, text in PAGE.items())


POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"
SPELLINGS: dict[str, tuple[dict[str, Any], str]] = {
    "possessive": (sequence(split(POSSESSIVE), byte_level()), "qwen2"),
    "gpt-2 as a split": (sequence(split(R50K), byte_level()), "gpt-2"),
    "what is not a match removed": (
        sequence(split(r.O200K, "Removed", invert=True), byte_level()),
        "gpt-4o",
    ),
    "nested": (sequence(sequence(digits()), sequence(byte_level(use_regex=True))), "smollm"),
    "raw line breaks": (
        sequence(split(r.QWEN2.replace(r"\r", "\r").replace(r"\n", "\n")), byte_level()),
        "qwen2",
    ),
    "digits as a split": (sequence(split(r"\p{N}"), byte_level(use_regex=True)), "smollm"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_split_the_same(spelling: str, tmp_path: Path):
    structure, name = SPELLINGS[spelling]
    tokenizer = trained(structure)
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=SIZE)
    assert keys["tokenizer.ggml.pre"].value == name
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    wanted = encode_all(tokenizer, PAGE)
    different = {key for key, text in PAGE.items() if vocabulary.encode(text) != wanted[key]}
    assert different == set(DIFFERS.get(name, ()))


def test_nfc_is_taken_and_matters_only_for_text_that_is_not_nfc(tmp_path: Path):
    tokenizer = published("qwen2") | {"normalizer": {"type": "NFC"}}
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=SIZE)
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    wanted = encode_all(tokenizer, PAGE)
    different = {key for key, text in PAGE.items() if vocabulary.encode(text) != wanted[key]}
    assert different == {"combining"}


def test_old_files_leave_out_what_is_true_by_default():
    assert read_steps({"type": "ByteLevel", "add_prefix_space": False}) == read_steps(
        byte_level(use_regex=True)
    )
    assert read_steps({"type": "ByteLevel"}) == read_steps(
        byte_level(use_regex=True, add_prefix_space=True)
    )


@pytest.mark.parametrize("name", ["tekken", "qwen2"])
def test_ignore_merges_may_differ_where_merges_make_every_token(name: str, tmp_path: Path):
    tokenizer = trained(STRUCTURES[name], ignore_merges=name not in IGNORE_MERGES)
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=SIZE)
    assert keys["tokenizer.ggml.pre"].value == name
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    wanted = encode_all(tokenizer, PAGE)
    different = {key for key, text in PAGE.items() if vocabulary.encode(text) != wanted[key]}
    assert different == set(DIFFERS.get(name, ()))


def test_ignore_merges_decides_where_a_token_is_not_made_by_merges(tmp_path: Path):
    tokenizer = trained(STRUCTURES["qwen2"], ignore_merges=True)
    word = max(tokenizer["model"]["vocab"], key=len)
    tokenizer["model"]["merges"] = [
        pair for pair in tokenizer["model"]["merges"] if "".join(pair) != word
    ]
    folder = write_folder(tmp_path, tokenizer=tokenizer)
    with pytest.raises(VocabularyError, match="ignore_merges is true") as error:
        load_vocabulary(folder, {}, vocab_size=SIZE)
    assert error.value.hint == "--pre qwen2 takes it all the same"
    keys = load_vocabulary(folder, {}, vocab_size=SIZE, pre="qwen2")
    assert keys["tokenizer.ggml.pre"].value == "qwen2"


def test_an_unknown_structure_names_the_closest(tmp_path: Path):
    tokenizer = published("qwen2")
    tokenizer["pre_tokenizer"] = sequence(split(r.CJK_AND_KANA), split(r.QWEN2), byte_level())
    folder = write_folder(tmp_path, tokenizer=tokenizer)
    with pytest.raises(VocabularyError) as error:
        load_vocabulary(folder, {}, vocab_size=SIZE)
    assert str(folder / "tokenizer.json") in error.value.message
    assert "the closest is 'qwen2'" in error.value.message
    assert r.CJK_AND_KANA in error.value.message
    assert error.value.hint is not None
    assert error.value.hint.startswith("--pre qwen2 ")
    keys = load_vocabulary(folder, {}, vocab_size=SIZE, pre="qwen2")
    assert keys["tokenizer.ggml.pre"].value == "qwen2"


def test_a_space_before_the_text_is_not_byte_level_gpt_2(tmp_path: Path):
    tokenizer = published("gpt-2")
    tokenizer["pre_tokenizer"] = byte_level(use_regex=True, add_prefix_space=True)
    folder = write_folder(tmp_path, tokenizer=tokenizer)
    with pytest.raises(VocabularyError, match=r"closest is 'gpt-2'.*bytes after a space"):
        load_vocabulary(folder, {}, vocab_size=SIZE)


@pytest.mark.parametrize("name", pretokenizers.WITHOUT_STRUCTURE)
def test_llama_cpp_knows_names_without_structure(name: str, tmp_path: Path):
    tokenizer = published("gpt-2")
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=SIZE, pre=name)
    assert keys["tokenizer.ggml.pre"].value == name
    LlamaVocabulary(keys, tmp_path / "vocab.gguf").encode("Hello, world 123!")


@pytest.mark.parametrize("line", pretokenizers.TABLE, ids=lambda line: line.name)
def test_names_of_one_line_are_split_alike(line: pretokenizers.PreTokenizer, tmp_path: Path):
    tokenizer = published(line.name)
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)

    def ids(name: str) -> list[list[int]]:
        keys = load_vocabulary(folder, {}, vocab_size=SIZE, pre=name)
        vocabulary = LlamaVocabulary(keys, tmp_path / f"{name}.gguf")
        return [vocabulary.encode(text) for text in PAGE.values()]

    first = ids(line.name)
    for name in line.also:
        assert ids(name) == first, name


def test_an_unknown_name_gets_a_near_miss_and_the_list(tmp_path: Path):
    folder = write_folder(tmp_path, tokenizer=published("gpt-2"))
    with pytest.raises(UsageError, match="no pre-tokenizer named 'lama-bpe'") as error:
        load_vocabulary(folder, {}, vocab_size=SIZE, pre="lama-bpe")
    assert error.value.hint is not None
    assert error.value.hint.startswith("did you mean llama-bpe")
    assert "deepseek-v3" in error.value.hint
    with pytest.raises(UsageError) as error:
        load_vocabulary(folder, {}, vocab_size=SIZE, pre="?")
    assert error.value.hint is not None
    assert error.value.hint.startswith("known: gpt-2, ")
