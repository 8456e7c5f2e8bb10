"""Special ids and what is added to a text, held against gguf's SpecialVocab and llama.cpp."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.tokenizers_build import (
    add_template,
    byte_level,
    encode_all,
    train_byte_level,
    write_folder,
)
from support.tokenizers_llama import LlamaVocabulary

from quantcli.errors import VocabularyError
from quantcli.vocab import load_vocabulary

SIZE = 700
BOS, EOS, USER = 0, 1, 2
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}


@cache
def _trained() -> str:
    return json.dumps(train_byte_level(byte_level(use_regex=True), size=600))


def tokenizer(*, first: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_trained())
    if first or last:
        add_template(result, first=first, last=last)
    return result


def _in_sequence(value: dict[str, Any]) -> dict[str, Any]:
    template = value["post_processor"]
    value["post_processor"] = {"type": "Sequence", "processors": [BYTE_LEVEL, template]}
    return value


def _with_separator() -> dict[str, Any]:
    value = tokenizer(first=("<|bos|>",))
    pair = value["post_processor"]["pair"]
    pair[:] = [pair[0], pair[1], {"SpecialToken": {"id": "<|eos|>", "type_id": 0}}, pair[3]]
    value["post_processor"]["special_tokens"]["<|eos|>"] = {
        "id": "<|eos|>", "ids": [EOS], "tokens": ["<|eos|>"],
    }  # fmt: skip
    return value


ROBERTA = {
    "type": "RobertaProcessing",
    "cls": ["<|bos|>", BOS],
    "sep": ["<|eos|>", EOS],
    "trim_offsets": True,
    "add_prefix_space": False,
}
OBJECT = {"__type": "AddedToken", "lstrip": False, "normalized": False}
NAMED = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}

FOLDERS: dict[str, dict[str, Any]] = {
    "nothing said": {"tokenizer": tokenizer(), "tokenizer_config": {"model_max_length": 8}},
    "template with BOS": {
        "tokenizer": tokenizer(first=("<|bos|>",)),
        "tokenizer_config": NAMED,
    },
    "template after ByteLevel": {
        "tokenizer": _in_sequence(tokenizer(first=("<|bos|>",))),
        "tokenizer_config": NAMED,
    },
    "template with both": {
        "tokenizer": tokenizer(first=("<|bos|>",), last=("<|eos|>",)),
        "tokenizer_config": NAMED,
    },
    "template names BOS": {
        "tokenizer": tokenizer(first=("<|bos|>",)),
        "tokenizer_config": {"eos_token": "<|eos|>"},
    },
    "template and configuration differ": {
        "tokenizer": tokenizer(first=("<|bos|>",)),
        "tokenizer_config": NAMED | {"add_bos_token": False},
    },
    "template with a separator": {
        "tokenizer": _with_separator(),
        "tokenizer_config": NAMED,
    },
    "ByteLevel adds nothing": {
        "tokenizer": tokenizer() | {"post_processor": BYTE_LEVEL},
        "tokenizer_config": NAMED | {"add_bos_token": True},
    },
    "configuration adds": {
        "tokenizer": tokenizer(),
        "tokenizer_config": NAMED | {"add_bos_token": True, "add_eos_token": True},
    },
    "Roberta": {
        "tokenizer": tokenizer() | {"post_processor": ROBERTA},
        "tokenizer_config": NAMED,
    },
    "every role": {
        "tokenizer": tokenizer(),
        "tokenizer_config": {"bos_token": OBJECT | {"content": "<|bos|>"}, "eos_token": "<|eos|>"}
        | {"unk_token": "<tool>", "pad_token": "<|user|>", "sep_token": "</tool>"}
        | {"mask_token": OBJECT | {"content": "<tool>"}},
    },
    "CLS and SEP": {
        "tokenizer": tokenizer(),
        "tokenizer_config": {"cls_token": "<|bos|>", "sep_token": "<|eos|>"},
    },
    "config.json": {
        "tokenizer": tokenizer(),
        "tokenizer_config": {"bos_token": None},
        "config": {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7},
    },
    "text_config": {
        "tokenizer": tokenizer(),
        "tokenizer_config": {"eos_token": "<|eos|>"},
        "config": {"text_config": {"bos_token_id": 5, "eos_token_id": 6}},
    },
    "no tokenizer_config.json": {
        "tokenizer": tokenizer(),
        "config": {"bos_token_id": 5, "eos_token_id": 6},
    },
}

ROLES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}


CHANGED = {"template names BOS", "template and configuration differ", "ByteLevel adds nothing"}
"""gguf 0.19 lets tokenizer_config.json overrule the post-processor; llama.cpp's later one, as
transformers 5, does not."""


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_flags_and_merges_are_those_of_gguf(name: str, tmp_path: Path):
    folder = write_folder(tmp_path, **copy.deepcopy(FOLDERS[name]))
    keys = load_vocabulary(folder, FOLDERS[name].get("config", {}), vocab_size=SIZE)
    theirs = gguf.SpecialVocab(folder, load_merges=True)
    assert keys["tokenizer.ggml.merges"].value == theirs.merges
    ours = {
        role: keys[key].value
        for role in ("bos", "eos", "unk", "sep", "pad", "mask")
        if (key := f"tokenizer.ggml.{ROLES.get(role, role)}_token_id") in keys
    }
    known = {role: number for role, number in theirs.special_token_ids.items() if role != "cls"}
    assert ours == known | ({"bos": BOS} if name in CHANGED else {})
    flags = {
        role: keys[key].value
        for role in ("bos", "eos", "sep")
        if (key := f"tokenizer.ggml.add_{role}_token") in keys
    }
    expected = {"bos": False, "eos": False} | theirs.add_special_token
    if name in CHANGED:
        expected["bos"] = not expected["bos"]
    assert flags == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_llama_cpp_adds_what_transformers_adds(name: str, tmp_path: Path):
    from transformers import AutoTokenizer

    files = copy.deepcopy(FOLDERS[name])
    files.setdefault("tokenizer_config", {})["tokenizer_class"] = "TokenizersBackend"
    folder = write_folder(tmp_path / "model", **files)
    keys = load_vocabulary(folder, files.get("config", {}), vocab_size=SIZE)
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    wanted = AutoTokenizer.from_pretrained(str(folder))("Hello, world!").input_ids
    if name == "configuration adds":
        # transformers 4 adds what add_bos_token says, and 5 what tokenizer.json says: nothing.
        wanted = [BOS, *wanted, EOS]
    assert vocabulary.encode("Hello, world!", add_special=True) == wanted


def test_the_template_decides_which_token_bos_is(tmp_path: Path):
    """SpecialVocab would add tokenizer_config.json's BOS, which the tokenizer itself does not."""
    made = tokenizer(first=("<|user|>",))
    folder = write_folder(tmp_path / "model", tokenizer=made, tokenizer_config=NAMED)
    keys = load_vocabulary(folder, {}, vocab_size=SIZE)
    assert keys["tokenizer.ggml.bos_token_id"].value == USER
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    wanted = encode_all(made, {"text": "a b"}, special=True)["text"]
    assert vocabulary.encode("a b", add_special=True) == wanted


def test_the_template_overrides_eos_which_becomes_end_of_turn(tmp_path: Path):
    made = tokenizer(first=("<|bos|>",), last=("<|user|>",))
    folder = write_folder(tmp_path / "model", tokenizer=made, tokenizer_config=NAMED)
    keys = load_vocabulary(folder, {}, vocab_size=SIZE)
    theirs = gguf.SpecialVocab(folder)
    assert theirs.special_token_ids["eos"] == keys["tokenizer.ggml.eos_token_id"].value == USER
    assert theirs.special_token_ids["eot"] == keys["tokenizer.ggml.eot_token_id"].value == EOS


def _extended(*texts: str) -> tuple[dict[str, Any], dict[str, int]]:
    made = tokenizer()
    ids = {}
    for text in texts:
        number = 1 + max(token["id"] for token in made["added_tokens"])
        made["added_tokens"].append(made["added_tokens"][0] | {"id": number, "content": text})
        ids[text] = number
    return made, ids


def test_llama_3_ends_at_each_of_its_listed_tokens(tmp_path: Path):
    made, ids = _extended("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    folder = write_folder(
        tmp_path / "model",
        tokenizer=made,
        tokenizer_config={"eos_token": "<|eot_id|>"},
        generation_config={"eos_token_id": list(ids.values())},
    )
    keys = load_vocabulary(folder, {"eos_token_id": list(ids.values())}, vocab_size=SIZE)
    assert keys["tokenizer.ggml.eos_token_id"].value == ids["<|eot_id|>"]
    assert keys["tokenizer.ggml.eot_token_id"].value == ids["<|eot_id|>"]
    assert keys["tokenizer.ggml.eom_token_id"].value == ids["<|eom_id|>"]
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    assert all(vocabulary.ends_generation(number) for number in ids.values())


def test_a_list_alone_gives_eos_and_further_ends(tmp_path: Path):
    made, ids = _extended("<stop>", "<halt>", "<end>")
    folder = write_folder(
        tmp_path / "model",
        tokenizer=made,
        generation_config={"eos_token_id": [ids["<stop>"], ids["<halt>"], ids["<end>"]]},
    )
    keys = load_vocabulary(folder, {"eos_token_id": None}, vocab_size=SIZE)
    assert keys["tokenizer.ggml.eos_token_id"].value == ids["<stop>"]
    assert keys["tokenizer.ggml.eot_token_id"].value == ids["<halt>"]
    assert keys["tokenizer.ggml.eom_token_id"].value == ids["<end>"]
    vocabulary = LlamaVocabulary(keys, tmp_path / "vocab.gguf")
    assert all(vocabulary.ends_generation(number) for number in ids.values())
    assert not vocabulary.ends_generation(USER)


def test_the_first_of_several_ends_of_turn_is_taken(tmp_path: Path):
    named = ("prefix", "suffix", "middle", "pad")
    made, ids = _extended(
        "<|endoftext|>",
        "<|im_end|>",
        *(f"<|fim_{name}|>" for name in named),
        "<|file_sep|>",
        "<|repo_name|>",
    )
    folder = write_folder(
        tmp_path / "model", tokenizer=made, tokenizer_config={"eos_token": "<|endoftext|>"}
    )
    keys = load_vocabulary(folder, {}, vocab_size=SIZE)
    found = {
        key.removeprefix("tokenizer.ggml.").removesuffix("_token_id"): value.value
        for key, value in keys.items()
        if key.endswith("_token_id")
    }
    assert found == {
        "eos": ids["<|endoftext|>"],
        "eot": ids["<|im_end|>"],
        "fim_pre": ids["<|fim_prefix|>"],
        "fim_suf": ids["<|fim_suffix|>"],
        "fim_mid": ids["<|fim_middle|>"],
        "fim_sep": ids["<|file_sep|>"],
        "fim_rep": ids["<|repo_name|>"],
        "fim_pad": ids["<|fim_pad|>"],
    }
    special = LlamaVocabulary(keys, tmp_path / "vocab.gguf").special()
    assert {
        role: special[role] for role in ("eot", "fim_pre", "fim_suf", "fim_mid", "fim_sep")
    } == {role: found[role] for role in ("eot", "fim_pre", "fim_suf", "fim_mid", "fim_sep")}


def test_special_tokens_map_and_generation_config_are_the_last_resort(tmp_path: Path):
    folder = write_folder(
        tmp_path,
        tokenizer=tokenizer(),
        special_tokens_map={"bos_token": {"content": "<|bos|>"}},
        generation_config={"eos_token_id": 9, "pad_token_id": -1},
    )
    keys = load_vocabulary(folder, {"pad_token_id": -1}, vocab_size=SIZE)
    assert keys["tokenizer.ggml.bos_token_id"].value == BOS
    assert keys["tokenizer.ggml.eos_token_id"].value == 9
    assert "tokenizer.ggml.padding_token_id" not in keys


def test_a_named_token_of_the_vocabulary_is_special(tmp_path: Path):
    made = tokenizer()
    made["added_tokens"] = []
    folder = write_folder(tmp_path, tokenizer=made, tokenizer_config=NAMED)
    keys = load_vocabulary(folder, {}, vocab_size=SIZE)
    assert keys["tokenizer.ggml.token_type"].value[:3] == [3, 3, 1]
    assert keys["tokenizer.ggml.eos_token_id"].value == EOS


def test_ids_outside_the_vocabulary(tmp_path: Path):
    folder = write_folder(tmp_path, tokenizer=tokenizer())
    keys = load_vocabulary(folder, {"pad_token_id": SIZE}, vocab_size=SIZE)
    assert "tokenizer.ggml.padding_token_id" not in keys
    with pytest.raises(VocabularyError, match="eos_token_id is 700, outside the vocabulary of 700"):
        load_vocabulary(folder, {"eos_token_id": SIZE}, vocab_size=SIZE)


def test_bos_that_is_added_must_be_known(tmp_path: Path):
    folder = write_folder(tmp_path, tokenizer=tokenizer(), tokenizer_config={"add_bos_token": True})
    with pytest.raises(VocabularyError, match="adds BOS to every text, but no file says"):
        load_vocabulary(folder, {}, vocab_size=SIZE)
    made = tokenizer(first=("<|bos|>",))
    made["post_processor"]["single"][0]["SpecialToken"]["id"] = "<gone>"
    write_folder(tmp_path, tokenizer=made)
    with pytest.raises(VocabularyError, match="the post_processor adds '<gone>', which is not"):
        load_vocabulary(folder, {}, vocab_size=SIZE)
