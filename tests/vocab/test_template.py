"""Chat templates from every place they are kept in, held against gguf's own keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from support.tokenizers_build import byte_level, train_byte_level, write_folder

from quantcli.errors import VocabularyError
from quantcli.vocab import load_vocabulary

TOKENIZER = train_byte_level(byte_level(use_regex=True), size=400)
DEFAULT = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %} — ünï"

PLACES: dict[str, dict[str, Any]] = {
    "none": {"tokenizer_config": {"eos_token": "<|eos|>"}},
    "text": {"tokenizer_config": {"chat_template": DEFAULT}},
    "list": {
        "tokenizer_config": {
            "chat_template": [
                {"name": "default", "template": DEFAULT},
                {"name": "tool-use 2", "template": "tools"},
                {"name": "rag", "template": "documents"},
            ]
        }
    },
    "list without default": {
        "tokenizer_config": {"chat_template": [{"name": "rag", "template": "documents"}]}
    },
    "chat_template.jinja": {
        "tokenizer_config": {"eos_token": "<|eos|>"},
        "chat_template__jinja": DEFAULT,
    },
    "chat_template.json": {
        "tokenizer_config": {"eos_token": "<|eos|>"},
        "chat_template": {"chat_template": DEFAULT},
    },
}


def templates(folder: Path) -> dict[str, Any]:
    keys = load_vocabulary(folder, {}, vocab_size=500)
    return {key: value.value for key, value in keys.items() if key.startswith("tokenizer.chat")}


def templates_of_gguf(folder: Path, path: Path) -> dict[str, Any]:
    writer = gguf.GGUFWriter(path, "llama")
    gguf.SpecialVocab(folder).add_to_gguf(writer, quiet=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(path).fields
    return {key: f.contents() for key, f in fields.items() if key.startswith("tokenizer.chat")}


@pytest.mark.parametrize("place", PLACES)
def test_keys_are_those_of_gguf(place: str, tmp_path: Path):
    folder = write_folder(tmp_path / "model", tokenizer=TOKENIZER, **PLACES[place])
    ours, theirs = templates(folder), templates_of_gguf(folder, tmp_path / "theirs.gguf")
    for found in (ours, theirs):
        if "tokenizer.chat_templates" in found:
            found["tokenizer.chat_templates"] = set(found["tokenizer.chat_templates"])
    assert ours == theirs


def test_additional_templates_stand_beside_the_default(tmp_path: Path):
    folder = write_folder(
        tmp_path / "model", tokenizer=TOKENIZER, tokenizer_config={}, chat_template__jinja=DEFAULT
    )
    write_folder(folder / "additional_chat_templates", rag__jinja="documents", tool__jinja="tools")
    assert templates(folder) == {
        "tokenizer.chat_template": DEFAULT,
        "tokenizer.chat_template.rag": "documents",
        "tokenizer.chat_template.tool": "tools",
        "tokenizer.chat_templates": ["rag", "tool"],
    }


def test_the_file_goes_before_the_configuration_as_in_transformers(tmp_path: Path):
    from transformers import AutoTokenizer

    folder = write_folder(
        tmp_path,
        tokenizer=TOKENIZER,
        tokenizer_config={
            "tokenizer_class": "TokenizersBackend",
            "backend": "tokenizers",
            "chat_template": "old",
        },
        chat_template__jinja="new",
    )
    assert templates(folder) == {"tokenizer.chat_template": "new"}
    assert AutoTokenizer.from_pretrained(str(folder)).chat_template == "new"


def test_templates_by_name_as_an_object(tmp_path: Path):
    folder = write_folder(
        tmp_path,
        tokenizer=TOKENIZER,
        tokenizer_config={"chat_template": {"default": "a", "rag": "b"}},
    )
    assert templates(folder) == {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.rag": "b",
        "tokenizer.chat_templates": ["rag"],
    }


@pytest.mark.parametrize(
    "broken", [7, [1], [{"name": "x"}], [{"template": "x"}], {"default": None}, [{"name": 1}]]
)
def test_a_template_of_another_form_is_refused(broken: Any, tmp_path: Path):
    folder = write_folder(tmp_path, tokenizer=TOKENIZER, tokenizer_config={"chat_template": broken})
    with pytest.raises(VocabularyError, match="chat_template is neither text nor a list"):
        load_vocabulary(folder, {}, vocab_size=500)


def test_a_template_that_is_not_text_is_refused(tmp_path: Path):
    folder = write_folder(tmp_path, tokenizer=TOKENIZER, chat_template__jinja=b"\xff\xfe")
    with pytest.raises(VocabularyError, match=r"chat_template\.jinja is not UTF-8 text"):
        load_vocabulary(folder, {}, vocab_size=500)
