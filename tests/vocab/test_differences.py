"""Settings that a GGUF has no place for: a sentence wherever the ids differ, and none elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from support.tokenizers_build import (
    add_template,
    byte_level,
    encode_all,
    train_byte_level,
    write_folder,
)
from support.tokenizers_llama import LlamaVocabulary
from support.tokenizers_spm import bpe_json, metaspace, train

from quantcli.types import MetaValue
from quantcli.vocab import load_vocabulary

SIZE = 700
TEXTS = {
    "plain": "the user said hello",
    "spaced": "a <L> b <R> c",
    "inside": "two spouses and a spouse",
    "chat": "<|user|> the user<|eos|>\n said",
}


def load(folder: Path, size: int = SIZE, **options: Any) -> tuple[dict[str, MetaValue], list[str]]:
    notes: list[str] = []
    options.setdefault("config", {})
    config = options.pop("config")
    keys = load_vocabulary(folder, config, vocab_size=size, on_note=notes.append, **options)
    return keys, notes


def different(tokenizer: dict[str, Any], keys: dict[str, MetaValue], path: Path) -> set[str]:
    """The texts whose ids llama.cpp gives otherwise than the tokenizers library."""
    name = str(keys["general.name"].value) if "general.name" in keys else "test"
    rest = {key: value for key, value in keys.items() if key != "general.name"}
    vocabulary = LlamaVocabulary(rest, path, name=name)
    wanted = encode_all(tokenizer, TEXTS)
    return {key for key, text in TEXTS.items() if vocabulary.encode(text) != wanted[key]}


def trained(**flags: dict[str, bool]) -> dict[str, Any]:
    made = train_byte_level(byte_level(use_regex=True), size=600)
    for number, (content, flag) in enumerate(flags.items()):
        number += len(made["model"]["vocab"]) + 4
        plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        made["added_tokens"].append(
            {"id": number, "content": content, "special": False, **plain, **flag}
        )
    return made


def test_a_plain_tokenizer_has_nothing_to_say(tmp_path: Path) -> None:
    made = trained()
    keys, notes = load(write_folder(tmp_path / "m", tokenizer=made))
    assert notes == []
    assert different(made, keys, tmp_path / "v.gguf") == set()


@pytest.mark.parametrize(
    ("content", "flag", "where"),
    [
        ("<L>", {"lstrip": True}, "spaced"),
        ("<R>", {"rstrip": True}, "spaced"),
        ("spouse", {"single_word": True}, "inside"),
    ],
)
def test_flags_of_added_tokens(
    content: str, flag: dict[str, bool], where: str, tmp_path: Path
) -> None:
    made = trained(**{content: flag})
    keys, notes = load(write_folder(tmp_path / "m", tokenizer=made))
    assert where in different(made, keys, tmp_path / "v.gguf")
    (note,) = notes
    assert "lstrip, rstrip, single_word" in note
    assert note.endswith(content)


def test_many_flags_are_counted(tmp_path: Path) -> None:
    made = trained(**{f"<{i}>": {"rstrip": True} for i in range(8)})
    _, (note,) = load(write_folder(tmp_path / "m", tokenizer=made))
    assert note.startswith("8 added tokens")
    assert note.endswith("<0>, <1>, <2>, <3>, <4> and 3 more")


def phi3(*, without: str | None = None) -> dict[str, Any]:
    """Added tokens as Phi-3 has them: all but three drop the spaces after them."""
    plain = ["<unk>", "<s>", "<|endoftext|>"]
    flags = {text: {} for text in plain if text != without} | {"</s>": {"rstrip": True}}
    made = trained(**flags)
    for token in made["added_tokens"]:
        token["rstrip"] = token["content"] not in plain
    return made


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Phi-3-mini-tune", "Phi-3-mini-tune"),
        ("Phi 3 Mini Tune", "Phi-3 Mini Tune"),
        ("my phi3", "my phi3"),
        ("Assistant", "Assistant (Phi-3)"),
    ],
)
def test_the_name_of_a_phi_3_strips_as_it_does(name: str, expected: str, tmp_path: Path) -> None:
    made = phi3()
    keys, notes = load(write_folder(tmp_path / "m", tokenizer=made), name=name)
    assert keys["general.name"].value == expected
    assert notes == []
    assert different(made, keys, tmp_path / "v.gguf") == set()


def test_a_name_like_phi_3_alone_does_not_strip(tmp_path: Path) -> None:
    made = trained()
    keys, notes = load(write_folder(tmp_path / "m", tokenizer=made), name="Phi-3 killer")
    assert keys["general.name"].value == "Phi 3 killer"
    assert notes == []
    assert different(made, keys, tmp_path / "v.gguf") == set()


def test_a_phi_3_without_its_plain_tokens_is_said(tmp_path: Path) -> None:
    """llama.cpp does not load such a vocabulary under Phi-3's name."""
    made = phi3(without="<unk>")
    keys, notes = load(write_folder(tmp_path / "m", tokenizer=made), name="phi-3")
    assert keys["general.name"].value == "Phi 3"
    assert "rstrip" in notes[0]
    assert different(made, keys, tmp_path / "v.gguf")


def pieces(scheme: str, tmp_path: Path, template: str | None) -> tuple[dict[str, Any], Path, int]:
    prefix = scheme != "never"
    model = train("bpe", size=1200, add_dummy_prefix=prefix)
    made = bpe_json(
        model, added=[("<|user|>", True), ("<|eos|>", True)], pre_tokenizer=metaspace(scheme)
    )
    add_template(made, first=["<s>"])
    config = {} if template is None else {"tokenizer_config": {"chat_template": template}}
    folder = write_folder(tmp_path / "m", tokenizer=made, **config)
    return made, folder, len(SentencePieceProcessor(model_proto=model)) + 2


@pytest.mark.parametrize(
    ("template", "prefixed"),
    [
        (None, True),
        ("{% for m in messages %}### {{ m.role }}: {{ m.content }}{% endfor %}", True),
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{%- if x %}{{ raise_exception('no') }}{%- endif %}\n{{- bos_token + '[INST]' }}", False),
        ("{% for m in messages %}{{ '<|user|>' + m.content }}{% endfor %}", False),
        ("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", False),
    ],
)
def test_a_prefix_for_the_first_word_alone(
    template: str | None, prefixed: bool, tmp_path: Path
) -> None:
    made, folder, size = pieces("first", tmp_path, template)
    keys, notes = load(folder, size)
    assert keys["tokenizer.ggml.add_space_prefix"].value is prefixed
    (note,) = notes
    assert "prepend_scheme 'first'" in note
    assert f"add_space_prefix=bool:{str(not prefixed).lower()}" in note
    wrong = different(made, keys, tmp_path / "v.gguf")
    assert ("chat" in wrong) is prefixed
    assert ("plain" in wrong) is not prefixed


@pytest.mark.parametrize(("scheme", "count"), [("always", 1), ("never", 0)])
def test_other_prefixes(scheme: str, count: int, tmp_path: Path) -> None:
    made, folder, size = pieces(scheme, tmp_path, None)
    keys, notes = load(folder, size)
    assert len(notes) == count
    wanted = encode_all(made, {"spaced": " the user"})["spaced"]
    found = LlamaVocabulary(keys, tmp_path / "v.gguf").encode(" the user")
    assert (found != wanted) == bool(count)


def test_nfc_is_said(tmp_path: Path) -> None:
    made = trained() | {"normalizer": {"type": "NFC"}}
    keys, (note,) = load(write_folder(tmp_path / "m", tokenizer=made))
    assert "NFC" in note
    text = {"accent": "cafe\u0301"}
    found = LlamaVocabulary(keys, tmp_path / "v.gguf").encode(text["accent"])
    assert found != encode_all(made, text)["accent"]


def test_more_ends_than_a_gguf_has_keys_for(tmp_path: Path) -> None:
    made = trained(**{f"<end{i}>": {} for i in range(5)})
    ids = [token["id"] for token in made["added_tokens"] if token["content"].startswith("<end")]
    folder = write_folder(tmp_path / "m", tokenizer=made, generation_config={"eos_token_id": ids})
    keys, (note,) = load(folder, config={"eos_token_id": ids})
    vocabulary = LlamaVocabulary(keys, tmp_path / "v.gguf")
    missed = [f"<end{i}>" for i, number in enumerate(ids) if not vocabulary.ends_generation(number)]
    assert missed == ["<end3>", "<end4>"]
    assert note.startswith("generation also ends at <end3>, <end4>")
