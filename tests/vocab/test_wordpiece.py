"""WordPiece against Hugging Face's library on one side and the real llama.cpp on the other."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers_build import encode_all, write_folder
from support.tokenizers_llama import LlamaVocabulary
from support.tokenizers_text import PAGE, training_text
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from quantcli.errors import UsageError, VocabularyError
from quantcli.vocab import load_vocabulary
from quantcli.vocab.rebuild import rebuild_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZE = 1400


@cache
def _trained(lowercase: bool, strip: bool | None) -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=1300, special_tokens=SPECIAL, show_progress=False, limit_alphabet=200
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return tokenizer.to_str()


def trained(*, lowercase: bool = True, strip: bool | None = None) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_trained(lowercase, strip))
    return result


NAMES = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep", "pad", "mask")}


@pytest.mark.parametrize(
    ("lowercase", "strip", "expected"),
    [
        (True, None, {"hindi", "korean"}),
        (False, None, set()),
        (True, False, {"turkish"}),
        (False, True, {"hindi", "korean"}),
    ],
)
def test_ids_are_the_tokenizers_own_or_it_is_said(
    lowercase: bool, strip: bool | None, expected: set[str], tmp_path: Path
) -> None:
    made = trained(lowercase=lowercase, strip=strip)
    folder = write_folder(tmp_path / "m", tokenizer=made, tokenizer_config=NAMES)
    notes: list[str] = []
    keys = load_vocabulary(folder, {}, vocab_size=SIZE, on_note=notes.append)
    assert len(notes) == bool(expected)
    assert keys["tokenizer.ggml.model"].value == "bert"
    assert keys["tokenizer.ggml.bos_token_id"].value == 2
    assert keys["tokenizer.ggml.seperator_token_id"].value == 3
    assert keys["tokenizer.ggml.unknown_token_id"].value == 1
    assert keys["tokenizer.ggml.padding_token_id"].value == 0
    assert keys["tokenizer.ggml.mask_token_id"].value == 4
    vocabulary = LlamaVocabulary(keys, tmp_path / "v.gguf")
    wanted = encode_all(made, PAGE, special=True)
    different = {
        key
        for key, text in PAGE.items()
        if vocabulary.encode(text, add_special=True) != wanted[key]
    }
    assert different == expected


def test_vocab_txt_alone_gives_the_same(tmp_path: Path) -> None:
    made = trained()
    folder = write_folder(tmp_path / "a", tokenizer=made, tokenizer_config=NAMES)
    pieces = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
    words = write_folder(tmp_path / "b", vocab__txt="\n".join(pieces) + "\n")
    assert load_vocabulary(words, {}, vocab_size=SIZE) == load_vocabulary(
        folder, {}, vocab_size=SIZE
    )


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_tokenizer_comes_back_from_a_gguf(lowercase: bool, tmp_path: Path) -> None:
    made = trained(lowercase=lowercase)
    folder = write_folder(tmp_path / "m", tokenizer=made, tokenizer_config=NAMES)
    rebuilt = rebuild_tokenizer(load_vocabulary(folder, {}, vocab_size=SIZE), "m.gguf").objects
    again = rebuilt["tokenizer.json"]
    assert again["model"]["vocab"] == made["model"]["vocab"]
    wanted = encode_all(made, PAGE, special=True)
    assert encode_all(dict(again), PAGE, special=True) == wanted
    pair = [Tokenizer.from_str(json.dumps(one)).encode("one", "two").ids for one in (made, again)]
    assert pair[0] == pair[1]
    assert rebuilt["tokenizer_config.json"]["cls_token"] == "[CLS]"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"normalizer": None}, "with nothing in place of BertNormalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace in place of BertPreTokenizer"),
        (
            {"normalizer": {"type": "BertNormalizer", "handle_chinese_chars": False}},
            "handle_chinese_chars is off",
        ),
    ],
)
def test_other_rules_are_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tokenizer=trained() | change)
    with pytest.raises(VocabularyError, match=sentence):
        load_vocabulary(folder, {}, vocab_size=SIZE)


def test_other_models_are_refused(tmp_path: Path) -> None:
    made = trained()
    made["model"]["continuing_subword_prefix"] = "@@"
    with pytest.raises(VocabularyError, match="begin with '@@'"):
        load_vocabulary(write_folder(tmp_path / "a", tokenizer=made), {}, vocab_size=SIZE)
    made = trained()
    made["model"]["unk_token"] = "[NO]"
    with pytest.raises(VocabularyError, match=r"unknown token '\[NO\]' is not in the vocabulary"):
        load_vocabulary(write_folder(tmp_path / "b", tokenizer=made), {}, vocab_size=SIZE)
    folder = write_folder(tmp_path / "c", tokenizer=trained())
    with pytest.raises(UsageError, match="--pre gpt-2 is for byte-level BPE"):
        load_vocabulary(folder, {}, vocab_size=SIZE, pre="gpt-2")
    with pytest.raises(VocabularyError, match="rows are needed"):
        load_vocabulary(folder, {}, vocab_size=100)
