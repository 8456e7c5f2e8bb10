"""SentencePiece models, from both kinds of file: llama.cpp's ids are the tokenizer's own."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from support.tokenizers_build import add_template, encode_all, write_folder
from support.tokenizers_llama import LlamaVocabulary
from support.tokenizers_spm import (
    PREPEND_AND_REPLACE,
    REPLACE,
    SPACE,
    SPLIT_AT_SPACES,
    added_token,
    bpe_json,
    metaspace,
    train,
    unigram_json,
)
from support.tokenizers_text import PAGE, training_text
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from quantcli.errors import UsageError, VocabularyError
from quantcli.vocab import load_vocabulary
from quantcli.vocab.rebuild import rebuild_tokenizer
from quantcli.vocab.sentencepiece_model import read_model

RUNS = [SPACE * run for run in range(2, 9)]

MODELS: dict[str, dict[str, Any]] = {
    "bpe": {"kind": "bpe"},
    "bpe without space prefix": {"kind": "bpe", "add_dummy_prefix": False},
    "gemma": {
        "kind": "bpe",
        "add_dummy_prefix": False,
        "user_defined_symbols": [*RUNS, "\n\n", "\n\n\n", "<tag>"],
    },
    "bpe of every character": {"kind": "bpe", "character_coverage": 1.0},
    "unigram": {"kind": "unigram", "size": 1200},
    "unigram with nfkc": {
        "kind": "unigram",
        "size": 1200,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "unigram without space prefix": {
        "kind": "unigram",
        "size": 1200,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<tag>", "\n\n"],
    },
}

SIGN = {"sign for a space"}
"""Runs of spaces are found before they become ▁, so not where a ▁ is in the text itself."""

DIFFERS = {
    # llama.cpp puts the first space before the first other character, and here is none.
    "unigram": {"only space", "only spaces"},
    "gemma": SIGN,
}


@cache
def model_of(name: str) -> bytes:
    return train(**MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_gives_sentencepieces_own_ids(name: str, tmp_path: Path):
    processor = SentencePieceProcessor(model_proto=model_of(name))
    folder = write_folder(tmp_path / "model", tokenizer__model=model_of(name))
    keys = load_vocabulary(folder, {}, vocab_size=len(processor) + 3)
    assert keys["tokenizer.ggml.model"].value == ("t5" if "unigram" in name else "llama")
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    different = {
        key
        for key, text in PAGE.items()
        if not alike(vocabulary.encode(text), processor.encode(text), unigram="unigram" in name)
    }
    assert different == DIFFERS.get(name, set())


def alike(ids: list[int], wanted: list[int], *, unigram: bool) -> bool:
    """Equal, or in a unigram model the same pieces in another order, as in "!" "!!" and "!!" "!".

    Such cuts have the same score. SentencePiece adds scores in single precision and llama.cpp in
    double, so which of them is the best by a rounding error is not the same.
    """
    return ids == wanted or (unigram and sorted(ids) == sorted(wanted))


@pytest.mark.parametrize("name", MODELS)
def test_pieces_scores_and_types_are_sentencepieces_own(name: str, tmp_path: Path):
    processor = SentencePieceProcessor(model_proto=model_of(name))
    folder = write_folder(tmp_path, tokenizer__model=model_of(name))
    keys = load_vocabulary(folder, {}, vocab_size=len(processor) + 2)
    count = len(processor)
    tokens = keys["tokenizer.ggml.tokens"].value
    assert tokens[count:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    types = keys["tokenizer.ggml.token_type"].value
    scores = keys["tokenizer.ggml.scores"].value
    for number in range(count):
        piece = processor.id_to_piece(number)
        assert tokens[number] == (piece.replace(SPACE, " ") if types[number] == 4 else piece)
        assert scores[number] == processor.get_score(number)
        assert (types[number] == 2) == processor.is_unknown(number)
        assert (types[number] == 3) == processor.is_control(number)
        assert (types[number] == 6) == processor.is_byte(number)
    assert types[count:] == [5, 5]
    assert keys["tokenizer.ggml.bos_token_id"].value == processor.bos_id()
    assert keys["tokenizer.ggml.eos_token_id"].value == processor.eos_id()
    assert keys["tokenizer.ggml.unknown_token_id"].value == processor.unk_id()
    prefix = "without" not in name and name != "gemma"
    assert keys["tokenizer.ggml.add_space_prefix"].value is prefix


SPECIAL_TEXTS = {
    "around": "<s>Hello</s> world<|user|>\n<|user|> again",
    "close": "<s>Hello</s>world<|user|>again<tag>and<tag>again",
    "added": "a<tag>b <tag> c<tag><tag>\n<tag>",
}

AFTER_A_SPACE = {"leading spaces", "only space", "only spaces", "space and line"}
"""Metaspace puts no ▁ before text that begins with a space; llama.cpp and SentencePiece do."""

JSONS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama 2": ("bpe", {"normalizer": PREPEND_AND_REPLACE}, set()),
    "metaspace always": (
        "bpe",
        {"pre_tokenizer": metaspace("always")},
        AFTER_A_SPACE | {"around", "added"},
    ),
    "metaspace first": (
        "bpe",
        {"pre_tokenizer": metaspace("first")},
        AFTER_A_SPACE | set(SPECIAL_TEXTS),  # "first" is none after a special token
    ),
    "metaspace never": (
        "bpe without space prefix",
        {"pre_tokenizer": metaspace("never")},
        set(),
    ),
    "gemma": ("gemma", {"normalizer": REPLACE, "pre_tokenizer": SPLIT_AT_SPACES}, SIGN),
}


@pytest.mark.parametrize("name", JSONS)
def test_merges_alone_give_the_tokenizers_own_ids(name: str, tmp_path: Path):
    source, parts, expected = JSONS[name]
    added = [("<tag>", False), ("<|user|>", True)]
    if source == "gemma":
        added += [(run, False) for run in RUNS] + [("\n\n", False), ("\n\n\n", False)]
    tokenizer = bpe_json(model_of(source), added=added, **parts)
    add_template(tokenizer, first=["<s>"])
    size = 3 + max(
        len(tokenizer["model"]["vocab"]), *(t["id"] + 1 for t in tokenizer["added_tokens"])
    )
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=size)
    assert keys["tokenizer.ggml.model"].value == "llama"
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    texts = PAGE | SPECIAL_TEXTS
    wanted = encode_all(tokenizer, texts, special=True)
    different = {
        key
        for key, text in texts.items()
        if vocabulary.encode(text, add_special=True) != wanted[key]
    }
    assert different == expected


def test_scores_from_merges_are_those_of_the_model(tmp_path: Path):
    from_json = write_folder(
        tmp_path / "json", tokenizer=bpe_json(model_of("bpe"), normalizer=PREPEND_AND_REPLACE)
    )
    from_model = write_folder(tmp_path / "model", tokenizer__model=model_of("bpe"))
    size = len(SentencePieceProcessor(model_proto=model_of("bpe")))
    one = load_vocabulary(from_json, {}, vocab_size=size)
    other = load_vocabulary(from_model, {}, vocab_size=size)
    for key in ("tokens", "token_type", "scores"):
        ours, theirs = (keys[f"tokenizer.ggml.{key}"].value for keys in (one, other))
        special = {0, 1, 2}
        for number in set(range(size)) - special:
            assert ours[number] == theirs[number], (key, number)


@pytest.mark.parametrize("name", ["unigram", "unigram with nfkc"])
def test_unigram_from_json_gives_the_tokenizers_own_ids(name: str, tmp_path: Path):
    path = tmp_path / "spiece.model"
    path.write_bytes(model_of(name))
    model = read_model(path)
    tokenizer = unigram_json(
        model_of(name), charsmap=model.charsmap, merged=model.remove_extra_whitespaces
    )
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=len(model.pieces))
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    wanted = encode_all(tokenizer, PAGE)
    different = {key for key, text in PAGE.items() if vocabulary.encode(text) != wanted[key]}
    assert different == ({"leading spaces", "space and line"} if name == "unigram" else set())


@pytest.mark.parametrize("legacy", [True, False])
def test_files_that_transformers_writes(legacy: bool, tmp_path: Path):
    from transformers import LlamaTokenizer

    parts = bpe_json(model_of("bpe"))["model"]
    merges = [tuple(pair) for pair in parts["merges"]]
    made = LlamaTokenizer(vocab=parts["vocab"], merges=merges, legacy=legacy)
    made.save_pretrained(tmp_path / "saved")
    tokenizer = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"])
    keys = load_vocabulary(tmp_path / "saved", {}, vocab_size=size)
    assert keys["tokenizer.ggml.model"].value == "llama"
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    wanted = encode_all(tokenizer, PAGE)
    different = {key for key, text in PAGE.items() if vocabulary.encode(text) != wanted[key]}
    assert different == AFTER_A_SPACE


def trained_merges(*, prefix: bool = False, over_lines: bool = False) -> dict[str, Any]:
    """A BPE over ▁-escaped text that was trained as merges, not converted from pieces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    )
    words = r"[^▁]+|▁[^▁]*" if over_lines else r"\n+|▁?[^▁\n]+|▁+"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=150,
        show_progress=False,
    )
    text = [line for line in training_text() if "\0" not in line]
    tokenizer.train_from_iterator(text, trainer)
    result: dict[str, Any] = json.loads(tokenizer.to_str())
    result["pre_tokenizer"] = None
    result["added_tokens"] = [t for t in result["added_tokens"] if "<0x" not in t["content"]]
    result["added_tokens"].append(added_token(2500, "<tag>", special=False))
    return result


@pytest.mark.parametrize(
    ("first", "kind"), [(["<s>"], ("gemma4", None)), ([], ("gpt2", "sarvam-moe"))]
)
def test_merges_that_are_not_pieces_run_as_they_are(
    first: list[str], kind: tuple[str, str | None], tmp_path: Path
):
    tokenizer = trained_merges()
    add_template(tokenizer, first=first)
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=2505)
    named = [keys.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
    assert tuple(value and value.value for value in named) == kind
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    texts = PAGE | SPECIAL_TEXTS
    wanted = encode_all(tokenizer, texts, special=True)
    for key, text in texts.items():
        assert vocabulary.encode(text, add_special=True) == wanted[key], key
    rebuilt = rebuild_tokenizer(keys, "m.gguf").objects["tokenizer.json"]
    assert encode_all(dict(rebuilt), texts, special=True) == wanted


def test_tokens_that_a_parser_of_gemma_4_looks_for_are_shown(tmp_path: Path):
    tokenizer = trained_merges()
    add_template(tokenizer, first=["<s>"])
    calls = ["<|tool_call>", "<|turn>", '<|"|>']
    for number, content in enumerate(calls, 2501):
        tokenizer["added_tokens"].append(added_token(number, content, special=True))
    folder = write_folder(tmp_path / "model", tokenizer=tokenizer)
    keys = load_vocabulary(folder, {}, vocab_size=2505)
    assert keys["tokenizer.ggml.token_type"].value[2501:2504] == [4, 3, 4]
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    text = "a<|tool_call>b<|turn>c"
    assert vocabulary.encode(text) == encode_all(tokenizer, {"": text})[""]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prefix": True}, "puts a space before the text"),
        ({"over_lines": True}, "joins line breaks with other text"),
    ],
)
def test_merges_that_llama_cpp_cannot_run_are_refused(
    options: dict[str, bool], reason: str, tmp_path: Path
):
    folder = write_folder(tmp_path, tokenizer=trained_merges(**options))
    with pytest.raises(VocabularyError, match=reason):
        load_vocabulary(folder, {}, vocab_size=2505)


def test_the_model_file_helps_where_merges_are_incomplete(tmp_path: Path):
    tokenizer = bpe_json(model_of("bpe"), normalizer=PREPEND_AND_REPLACE)
    del tokenizer["model"]["merges"][100]
    size = len(tokenizer["model"]["vocab"])
    folder = write_folder(tmp_path, tokenizer=tokenizer, tokenizer__model=model_of("bpe"))
    keys = load_vocabulary(folder, {}, vocab_size=size)
    processor = SentencePieceProcessor(model_proto=model_of("bpe"))
    assert keys["tokenizer.ggml.scores"].value[300] == processor.get_score(300)
    vocab = tokenizer["model"]["vocab"]
    one, other = processor.id_to_piece(300), processor.id_to_piece(301)
    vocab[one], vocab[other] = vocab[other], vocab[one]
    write_folder(tmp_path, tokenizer=tokenizer)
    with pytest.raises(VocabularyError, match=r"as token 30[01], where .*tokenizer\.model has"):
        load_vocabulary(folder, {}, vocab_size=size)


def test_added_tokens_of_a_folder_without_tokenizer_json(tmp_path: Path):
    size = len(SentencePieceProcessor(model_proto=model_of("bpe")))
    folder = write_folder(
        tmp_path / "model",
        tokenizer__model=model_of("bpe"),
        added_tokens={"<old>": size, "<|both|>": size + 1},
        tokenizer_config={
            "bos_token": "</s>",
            "add_bos_token": False,
            "add_eos_token": True,
            "added_tokens_decoder": {
                "259": {"content": "<renamed>", "special": False},
                str(size + 1): {"content": "<|both|>", "special": True},
                str(size + 2): {"content": f"two{SPACE}words", "special": False},
            },
        },
    )
    keys = load_vocabulary(folder, {}, vocab_size=size + 3)
    tokens = keys["tokenizer.ggml.tokens"].value
    types = keys["tokenizer.ggml.token_type"].value
    assert tokens[size:] == ["<old>", "<|both|>", "two words"]
    assert types[size:] == [4, 3, 4]
    assert (tokens[259], types[259]) == ("<renamed>", 4)
    assert keys["tokenizer.ggml.bos_token_id"].value == 2
    assert keys["tokenizer.ggml.add_bos_token"].value is False
    assert keys["tokenizer.ggml.add_eos_token"].value is True
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    ids = vocabulary.encode("x<old>two words<|both|><renamed>")
    assert [number for number in ids if number >= size or number == 259] == [
        size, size + 2, size + 1, 259,
    ]  # fmt: skip


def test_a_user_defined_piece_with_a_space_is_never_found(tmp_path: Path):
    """SentencePiece replaces spaces first, so its own encoder does not find such a piece."""
    model = train("bpe", add_dummy_prefix=False, user_defined_symbols=["  ", "two words"])
    processor = SentencePieceProcessor(model_proto=model)
    folder = write_folder(tmp_path / "model", tokenizer__model=model)
    keys = load_vocabulary(folder, {}, vocab_size=len(processor))
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    for text in (*PAGE.values(), "just two words"):
        assert vocabulary.encode(text) == processor.encode(text)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "normalized": (
        {"kind": "bpe", "normalization_rule_name": "nmt_nfkc"},
        r"tokenizer.model: text is normalized \(nmt_nfkc\)",
    ),
    "spaces removed": ({"kind": "bpe", "remove_extra_whitespaces": True}, "runs of spaces become"),
    "runs of spaces with a prefix": (
        {"kind": "bpe", "user_defined_symbols": RUNS},
        "the user-defined piece '▁▁' stands for spaces",
    ),
    "unigram with bytes": (
        {"kind": "unigram", "size": 1500, "byte_fallback": True},
        "unigram model with byte fallback",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_leaves_out_is_refused_unless_asked_for(name: str, tmp_path: Path):
    options, sentence = REFUSED[name]
    model = train(**options)
    size = len(SentencePieceProcessor(model_proto=model))
    folder = write_folder(tmp_path / "model", tokenizer__model=model)
    with pytest.raises(VocabularyError, match=sentence) as error:
        load_vocabulary(folder, {}, vocab_size=size)
    assert error.value.hint == "--pre default takes llama.cpp's way"
    keys = load_vocabulary(folder, {}, vocab_size=size, pre="default")
    LlamaVocabulary(keys, tmp_path / "vocab.gguf").encode("any text")


NEVER: dict[str, tuple[dict[str, Any], str]] = {
    "no byte tokens": ({"kind": "bpe", "byte_fallback": False}, "bytes have no token"),
    "words": ({"kind": "word", "size": 800}, "of type word"),
    "characters": ({"kind": "char", "size": 400, "character_coverage": 0.98}, "of type char"),
    "space after words": (
        {"kind": "bpe", "treat_whitespace_as_suffix": True},
        "writes spaces as a suffix",
    ),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_llama_cpp_cannot_run_is_refused(name: str, tmp_path: Path):
    options, sentence = NEVER[name]
    folder = write_folder(tmp_path, tokenizer__model=train(**options))
    for pre in (None, "default"):
        with pytest.raises(VocabularyError, match=sentence):
            load_vocabulary(folder, {}, vocab_size=4000, pre=pre)


def test_only_default_can_be_asked_for(tmp_path: Path):
    folder = write_folder(tmp_path, tokenizer__model=model_of("bpe"))
    with pytest.raises(UsageError, match="--pre qwen2 is for byte-level BPE"):
        load_vocabulary(folder, {}, vocab_size=3000, pre="qwen2")


def test_components_that_llama_cpp_has_not(tmp_path: Path):
    tokenizer = bpe_json(model_of("bpe"), normalizer=PREPEND_AND_REPLACE)
    tokenizer["normalizer"] = copy.deepcopy(tokenizer["normalizer"])
    tokenizer["normalizer"]["normalizers"].insert(0, {"type": "NFKC"})
    folder = write_folder(tmp_path, tokenizer=tokenizer)
    with pytest.raises(VocabularyError, match="the tokenizer uses NFKC") as error:
        load_vocabulary(folder, {}, vocab_size=2600)
    assert error.value.hint == "--pre default leaves it out"
    tokenizer = bpe_json(model_of("bpe"), pre_tokenizer=metaspace("always", split=True))
    write_folder(tmp_path, tokenizer=tokenizer)
    with pytest.raises(VocabularyError, match="text is split at spaces first, so the piece '▁▁"):
        load_vocabulary(folder, {}, vocab_size=2600)


def test_the_library_that_is_the_oracle_is_recent():
    assert tuple(map(int, tokenizers.__version__.split(".")[:2])) >= (0, 21)
