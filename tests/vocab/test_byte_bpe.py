"""Byte-level BPE as a whole: the model in the repository, the token list, what is refused."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers_build import (
    ADDED,
    byte_level,
    encode_all,
    train_byte_level,
    write_folder,
)
from support.tokenizers_llama import LlamaVocabulary
from support.tokenizers_spm import added_token
from support.tokenizers_text import PAGE

from quantcli.errors import VocabularyError
from quantcli.vocab import load_vocabulary

BOOKWORM = Path(__file__).parents[1] / "data" / "bookworm-mini"
SIZE = 604


@cache
def _trained() -> str:
    return json.dumps(train_byte_level(byte_level(use_regex=True), size=600))


def tokenizer(**changes: Any) -> dict[str, Any]:
    return json.loads(_trained()) | changes


def with_model(**changes: Any) -> dict[str, Any]:
    made = tokenizer()
    made["model"] |= changes
    return made


def load(folder: Path, made: dict[str, Any], *, size: int = SIZE, **others: Any) -> dict[str, Any]:
    keys = load_vocabulary(
        write_folder(folder, tokenizer=made, **others), {}, vocab_size=size, pre=None
    )
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in keys.items()}


def test_bookworm_mini(tmp_path: Path):
    config = json.loads((BOOKWORM / "config.json").read_text())
    keys = load_vocabulary(BOOKWORM, config, vocab_size=config["vocab_size"])
    plain = {key: value for key, value in keys.items() if not value.kind.startswith("[")}
    assert {key.removeprefix("tokenizer.ggml."): value.value for key, value in plain.items()} == {
        "model": "gpt2",
        "pre": "llama-bpe",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "eot_token_id": 1,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    assert len(keys["tokenizer.ggml.tokens"].value) == config["vocab_size"]
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    made = json.loads((BOOKWORM / "tokenizer.json").read_text())
    texts = PAGE | {"special": "<|begin_of_text|>Once\n<|end_of_text|><|end_of_text|> upon"}
    wanted = encode_all(made, texts, special=True)
    for name, text in texts.items():
        assert vocabulary.encode(text, add_special=True) == wanted[name], name


def test_pieces_of_text_come_back_whole(tmp_path: Path):
    keys = load_vocabulary(write_folder(tmp_path, tokenizer=tokenizer()), {}, vocab_size=SIZE)
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    for text in (*PAGE.values(), "".join(ADDED)):
        assert vocabulary.decode(vocabulary.encode(text)) == text.encode()


def test_types_padding_and_holes(tmp_path: Path):
    made = tokenizer()
    vocab = made["model"]["vocab"]
    unused = next(
        token for token in sorted(vocab, key=vocab.__getitem__, reverse=True)
        if not any(token in pair or "".join(pair) == token for pair in made["model"]["merges"][:-1])
    )  # fmt: skip
    hole = vocab.pop(unused)
    made["model"]["merges"] = [p for p in made["model"]["merges"] if "".join(p) != unused]
    made["added_tokens"] = [token for token in made["added_tokens"] if token["id"] < 600]
    keys = load(tmp_path, made, size=608)
    assert keys["tokens"][hole] == f"[PAD{hole}]"
    assert keys["tokens"][600:] == [f"[PAD{number}]" for number in range(600, 608)]
    types = keys["token_type"]
    assert types[:4] == [3, 3, 3, 1]
    assert types[hole] == 5
    assert types[600:] == [5] * 8
    assert len(keys["tokens"]) == len(types) == 608


def test_added_tokens_are_special_user_defined_or_look_special(tmp_path: Path):
    made = tokenizer()
    texts = {"<|looks|>": 3, "<｜looks｜>": 3, "<unused7>": 3, "<pad>": 3, "[plain]": 4, "a▁b": 4}
    for text in texts:
        number = len(made["model"]["vocab"]) + sum(t["id"] >= 600 for t in made["added_tokens"])
        made["added_tokens"].append(added_token(number, text, special=False))
    keys = load(tmp_path, made, size=620)
    assert {text: keys["token_type"][keys["tokens"].index(text)] for text in texts} == texts


def test_added_tokens_that_only_tokenizer_config_has(tmp_path: Path):
    keys = load(
        tmp_path,
        tokenizer(),
        size=606,
        tokenizer_config={
            "added_tokens_decoder": {
                "604": {"content": "<more>", "special": True},
                "605": {"content": "less", "special": False},
            }
        },
    )
    assert keys["tokens"][604:] == ["<more>", "less"]
    assert keys["token_type"][604:] == [3, 4]


def test_an_added_token_is_written_as_nfc_leaves_it(tmp_path: Path):
    made = tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})
    made["added_tokens"] += [
        added_token(604, "cafe\u0301", special=False, normalized=True),
        added_token(605, "nai\u0308ve", special=False, normalized=False),
    ]
    keys = load_vocabulary(write_folder(tmp_path / "model", tokenizer=made), {}, vocab_size=606)
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    texts = {"composed": "a café b", "as it stands": "a nai\u0308ve b"}
    wanted = encode_all(made, texts)
    for name, text in texts.items():
        assert vocabulary.encode(text) == wanted[name]
        assert {604, 605} & set(wanted[name])


def test_merges_as_text_and_as_pairs_are_the_same(tmp_path: Path):
    pairs = tokenizer()
    texts = copy.deepcopy(pairs)
    texts["model"]["merges"] = [" ".join(pair) for pair in pairs["model"]["merges"]]
    assert load(tmp_path / "a", pairs) == load(tmp_path / "b", texts)


def test_files_from_before_the_type_was_written(tmp_path: Path):
    made = tokenizer()
    del made["model"]["type"]
    assert load(tmp_path, made)["model"] == "gpt2"


def test_special_tokens_without_a_row_are_dropped_and_others_not(tmp_path: Path):
    made = tokenizer()
    made["added_tokens"].append(added_token(604, "<image>"))
    assert len(load(tmp_path, made)["tokens"]) == SIZE
    made["added_tokens"][-1]["special"] = False
    with pytest.raises(VocabularyError, match="605 rows are needed"):
        load(tmp_path, made)


def test_more_tokens_than_rows_names_both_numbers(tmp_path: Path):
    with pytest.raises(
        VocabularyError,
        match=r"tokenizer\.json has tokens up to id 599, so 600 rows are needed, but the model's "
        "vocab_size is 512",
    ):
        load(tmp_path, tokenizer(), size=512)


def _twice() -> dict[str, Any]:
    made = tokenizer()
    vocab = made["model"]["vocab"]
    vocab["Ġzzz"] = vocab["Ġ"]
    return made


def _same_text() -> dict[str, Any]:
    made = tokenizer()
    made["model"]["vocab"]["[PAD605]"] = 604
    made["added_tokens"] = []
    return made


def _added(number: int, content: str) -> dict[str, Any]:
    made = tokenizer()
    made["added_tokens"].append(added_token(number, content))
    return made


def _alphabet(**model: Any) -> dict[str, Any]:
    made = with_model(**model)
    del made["model"]["vocab"]["ÿ"]
    made["added_tokens"] = []
    return made


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no merges": (with_model(merges=[]), "the BPE model has no merges"),
    "merge of three": (with_model(merges=["a b c"]), r"merge 0 \('a b c'\) is not a pair"),
    "merge of unknown": (
        with_model(merges=[["a", "☃"]]),
        r"merge 0 \('a' \+ '☃'\) needs the token '☃', which is not in the vocabulary",
    ),
    "merge into unknown": (
        with_model(merges=[["Q", "X"]]),
        r"merge 0 \('Q' \+ 'X'\) needs the token 'QX'",
    ),
    "an id twice": (_twice(), r"tokens 'Ġ' and 'Ġzzz' both have id \d+"),
    "a negative id": (with_model(vocab={"a": -1}), "token 'a' has the id -1"),
    "the same text": (_same_text(), r"tokens 604 and 605 are both '\[PAD605\]' for llama.cpp"),
    "added token elsewhere": (
        _added(700, "<new>"),
        "added token '<new>' has id 700, but the tokenizers library gives it 604",
    ),
    "added token in the vocabulary": (
        _added(604, "a"),
        r"added token 'a' has id 604, but the tokenizers library gives it \d+",
    ),
    "word suffix": (with_model(end_of_word_suffix="</w>"), "marks parts of words with '</w>'"),
    "byte missing": (
        _alphabet(unk_token="<|bos|>"),
        r"1 of the 256 bytes have no token \(the first is 'ÿ'\)",
    ),
    "normalizer": (tokenizer(normalizer={"type": "NFKC"}), "text is normalized with NFKC"),
    "WordPiece": (
        with_model(type="WordPiece"),
        "a WordPiece model with .* in place of BertNormalizer",
    ),
    "untyped WordPiece": (
        tokenizer(model={"vocab": {"[UNK]": 0}}),
        "a WordPiece model with .* in place of BertNormalizer",
    ),
    "no bytes, no spaces": (
        tokenizer(pre_tokenizer={"type": "Whitespace"}),
        "neither a byte-level tokenizer .* nor of the SentencePiece kind",
    ),
    "vocabulary of another type": (
        with_model(vocab=[["a", 0.0]]),
        "the vocabulary of a BPE model is a list",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_tokenizer_has_its_sentence(name: str, tmp_path: Path):
    made, sentence = BROKEN[name]
    with pytest.raises(VocabularyError, match=sentence) as error:
        load(tmp_path, made, size=606)
    assert str(tmp_path / "tokenizer.json") in error.value.message


def test_a_byte_that_no_text_may_use_can_be_missing(tmp_path: Path):
    assert load(tmp_path, _alphabet())["pre"] == "gpt-2"


def test_pre_takes_a_tokenizer_that_normalizes(tmp_path: Path):
    folder = write_folder(tmp_path, tokenizer=tokenizer(normalizer={"type": "Lowercase"}))
    keys = load_vocabulary(folder, {}, vocab_size=SIZE, pre="gpt-2")
    assert keys["tokenizer.ggml.normalizer.lowercase"].value is True
    assert keys["tokenizer.ggml.pre"].value == "gpt-2"


def test_pre_takes_a_tokenizer_without_byte_level(tmp_path: Path):
    folder = write_folder(tmp_path, tokenizer=tokenizer(pre_tokenizer=None))
    keys = load_vocabulary(folder, {}, vocab_size=SIZE, pre="gpt-2")
    assert keys["tokenizer.ggml.model"].value == "gpt2"
