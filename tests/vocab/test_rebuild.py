"""Tokenizer files made of a GGUF's key-values give llama.cpp's own ids for the same key-values."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from support.tokenizers_build import ADDED, add_template, encode_all, train_byte_level, write_folder
from support.tokenizers_llama import LlamaVocabulary
from support.tokenizers_spm import (
    PREPEND_AND_REPLACE,
    REPLACE,
    SPACE,
    bpe_json,
    train,
)
from support.tokenizers_structures import DIFFERS, IGNORE_MERGES, STRUCTURES
from support.tokenizers_text import PAGE
from tokenizers import Tokenizer

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue, array, text
from quantcli.vocab import load_vocabulary, pretokenizers
from quantcli.vocab.pretokenizer_steps import read_steps
from quantcli.vocab.rebuild import rebuild_tokenizer
from quantcli.vocab.rebuild_bytes import pre_tokenizer

RUNS = [SPACE * run for run in range(2, 9)]
TEXTS = PAGE | {
    "added": "".join(f"a{token}b {token} c\n" for token in ADDED) + "<|user|>Hello<|eos|> <|user|>",
    "spm": "<s>Hello</s> world<|user|>\n<|user|> again a<tag>b <tag> c<tag><tag>\n<tag>",
}


def ids_of_both(
    keys: dict[str, MetaValue], folder: Path
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """llama.cpp's ids of all texts, and those of the rebuilt tokenizer.json."""
    vocabulary = LlamaVocabulary(keys, folder / "vocab.gguf")
    rebuilt = rebuild_tokenizer(keys, "m.gguf")
    found = encode_all(dict(rebuilt.objects["tokenizer.json"]), TEXTS, special=True)
    wanted = {key: vocabulary.encode(text, add_special=True) for key, text in TEXTS.items()}
    return wanted, found


@cache
def _trained(structure: str, ignore_merges: bool) -> str:
    return json.dumps(train_byte_level(json.loads(structure), ignore_merges=ignore_merges))


@pytest.mark.parametrize("line", pretokenizers.TABLE, ids=lambda line: line.name)
def test_every_pre_tokenizer_has_its_structure_again(line: pretokenizers.PreTokenizer):
    assert read_steps(pre_tokenizer(line)) == line.steps


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "tekken", "falcon", "deepseek-v3"])
def test_byte_level_ids_are_those_of_llama_cpp(name: str, tmp_path: Path):
    tokenizer = json.loads(_trained(json.dumps(STRUCTURES[name]), name in IGNORE_MERGES))
    add_template(tokenizer, first=["<|bos|>"], last=["<|eos|>"] if name == "qwen2" else [])
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    wanted, found = ids_of_both(load_vocabulary(folder, {}, vocab_size=3010), tmp_path)
    different = {key for key in TEXTS if wanted[key] != found[key]}
    assert different == set(DIFFERS.get(name, ()))


SPM: dict[str, dict[str, Any]] = {
    "llama 2": {},
    "gemma": {
        "add_dummy_prefix": False,
        "user_defined_symbols": [*RUNS, "\n\n", "\n\n\n", "<tag>"],
    },
}


@pytest.mark.parametrize("name", SPM)
def test_piece_ids_are_those_of_llama_cpp(name: str, tmp_path: Path):
    model = train("bpe", **SPM[name])
    folder = write_folder(
        tmp_path / "model",
        tokenizer__model=model,
        added_tokens={} if name == "gemma" else {"<tag>": 2500, "<|user|>": 2501},
    )
    size = len(SentencePieceProcessor(model_proto=model)) + 3
    wanted, found = ids_of_both(load_vocabulary(folder, {}, vocab_size=size), tmp_path)
    assert {key for key in TEXTS if wanted[key] != found[key]} == set()


UNIGRAM: dict[str, dict[str, Any]] = {
    "plain": {},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "without space prefix": {
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<tag>", "\n\n"],
    },
}


@pytest.mark.parametrize("name", UNIGRAM)
def test_unigram_ids_are_those_of_llama_cpp(name: str, tmp_path: Path):
    model = train("unigram", size=1200, **UNIGRAM[name])
    folder = write_folder(tmp_path / "model", tokenizer__model=model)
    size = len(SentencePieceProcessor(model_proto=model)) + 3
    wanted, found = ids_of_both(load_vocabulary(folder, {}, vocab_size=size), tmp_path)
    assert {key for key in TEXTS if wanted[key] != found[key]} == set()


def test_merges_come_back_as_they_were(tmp_path: Path):
    tokenizer = bpe_json(train("bpe"), normalizer=PREPEND_AND_REPLACE)
    folder = write_folder(tmp_path, tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=len(tokenizer["model"]["vocab"]))
    rebuilt = rebuild_tokenizer(keys, "m.gguf").objects["tokenizer.json"]
    assert rebuilt["model"]["vocab"] == tokenizer["model"]["vocab"]
    made = {}
    for rank, (left, right) in enumerate(rebuilt["model"]["merges"]):
        made.setdefault(left + right, rank)
    original = {}
    for rank, (left, right) in enumerate(tokenizer["model"]["merges"]):
        original.setdefault(left + right, rank)
    assert list(made) == list(original)
    assert rebuilt["normalizer"]["normalizers"][1] == REPLACE


def test_decoding_gives_the_text_back(tmp_path: Path):
    for model, value in (("bpe", {}), ("gemma", SPM["gemma"])):
        folder = write_folder(tmp_path / model, tokenizer__model=train("bpe", **value))
        size = len(SentencePieceProcessor(model_proto=train("bpe", **value)))
        rebuilt = rebuild_tokenizer(load_vocabulary(folder, {}, vocab_size=size), "m.gguf")
        library = Tokenizer.from_str(json.dumps(rebuilt.objects["tokenizer.json"]))
        for sample in ("The quick brown fox", "one  two\n\nthree 長江 🚀"):
            assert library.decode(library.encode(sample).ids) == sample


def test_transformers_loads_what_is_rebuilt(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer = json.loads(_trained(json.dumps(STRUCTURES["llama-bpe"]), True))
    add_template(tokenizer, first=["<|bos|>"])
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = write_folder(
        tmp_path / "model",
        tokenizer=tokenizer,
        tokenizer_config={"eos_token": "<|eos|>", "chat_template": template},
    )
    keys = load_vocabulary(folder, {}, vocab_size=3010)
    rebuilt = rebuild_tokenizer(keys, "m.gguf", context=77)
    for name, value in rebuilt.objects.items():
        (tmp_path / name).write_text(json.dumps(value))
    for name, value in rebuilt.texts.items():
        (tmp_path / name).write_text(value)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.eos_token) == ("<|bos|>", "<|eos|>")
    assert loaded.model_max_length == 77
    message = [{"role": "user", "content": "<|user|>Hi there"}]
    assert loaded.apply_chat_template(message, tokenize=False) == "<|bos|><|user|>Hi there"
    wanted = encode_all(tokenizer, TEXTS, special=True)
    assert {key: loaded(sample)["input_ids"] for key, sample in TEXTS.items()} == wanted


def _keys(**changes: MetaValue) -> dict[str, MetaValue]:
    keys = {
        "model": text("gpt2"), "pre": text("gpt-2"), "tokens": array("str", ["a", "b"]),
        "token_type": array("i32", [1, 1]), "merges": array("str", ["a b"]),
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items()}


REFUSED = {
    "no tokenizer": ({}, r"m\.gguf has no tokenizer"),
    "no model": (_keys(model=text("none")), r"m\.gguf has no tokenizer"),
    "a kind": (_keys(model=text("rwkv")), "of the kind 'rwkv' cannot be rebuilt"),
    "no separator": (_keys(model=text("bert")), "the unk token is 100, which is none of the 2"),
    "unigram": (_keys(model=text("t5")), "2 pieces but 0 scores"),
    "no unknown": (
        _keys(model=text("t5"), scores=array("f32", [0.0, -1.0])),
        "without an unknown piece",
    ),
    "a name": (_keys(pre=text("default")), "'default' splits text stands in llama.cpp's code"),
    "types": (_keys(token_type=array("i32", [1])), "2 tokens but 1 token types"),
    "merges": (_keys(merges=array("str", ["ab"])), r"merge 0 \('ab'\) is not a pair"),
    "a merge of bytes": (_keys(merges=array("str", [b"\xff a"])), "is not a pair"),
    "tokens of numbers": (_keys(tokens=array("i32", [1, 2])), r"tokens is of kind \[i32\]"),
    "scores of text": (_keys(scores=text("high")), "scores is of kind str"),
    "no merges": ({k: v for k, v in _keys().items() if "merges" not in k}, "without merges"),
    "scores": (_keys(model=text("llama")), "2 pieces but 0 scores"),
    "bytes": (_keys(tokens=array("str", ["a", b"\xff"])), "token 1 is not UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_determine_a_tokenizer_is_refused(case: tuple[dict[str, MetaValue], str]):
    with pytest.raises(VocabularyError, match=case[1]):
        rebuild_tokenizer(case[0], "m.gguf")


def test_equal_scores_are_remarked():
    pieces = ["<unk>", "a", "b", "ab", "ba"]
    keys = _keys(
        model=text("llama"), tokens=array("str", pieces), token_type=array("i32", [2, 1, 1, 1, 1]),
        scores=array("f32", [0.0, -3.0, -4.0, -1.0, -1.0]),
    )  # fmt: skip
    (note,) = rebuild_tokenizer(keys, "m.gguf").notes
    assert note.startswith("2 pieces share their score")
