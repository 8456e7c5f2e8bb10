"""The kind of tokenizer, told without reading a vocabulary."""

from __future__ import annotations

import json

import pytest

from quantcli.report.tokenizer import kind_in_folder, kind_in_gguf

BYTES = {"type": "ByteLevel"}
VOCAB = {'quote "model": {': 0, '"vocab": [': 1}
FILES = {
    "byte-level": ({"pre_tokenizer": BYTES, "model": {"type": "BPE", "vocab": VOCAB}},
                   "byte-level BPE"),
    "in a sequence": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES]},
                       "model": {"type": "BPE", "vocab": VOCAB, "merges": []}}, "byte-level BPE"),
    "fallback": ({"model": {"type": "BPE", "byte_fallback": True, "vocab": VOCAB}},
                 "SentencePiece BPE"),
    "neither": ({"model": {"type": "BPE", "vocab": VOCAB}}, "BPE"),
    "unigram": ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}},
                "SentencePiece unigram"),
    "word piece": ({"model": {"type": "WordPiece", "vocab": VOCAB}}, "WordPiece"),
    "type comes last": ({"model": {"vocab": VOCAB, "type": "Unigram"}}, "SentencePiece unigram"),
    "no type": ({"model": {"vocab": VOCAB}}, None),
    "token named so": ({"added_tokens": [{"content": '"model": {"'}],
                        "model": {"type": "WordLevel", "vocab": VOCAB}}, "WordLevel"),
    "no model": ({"pre_tokenizer": BYTES}, None),
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("case", FILES)
def test_a_tokenizer_json_says_its_kind(case, indent, tmp_path):
    content, kind = FILES[case]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=indent))
    assert kind_in_folder(tmp_path) == kind


def test_the_vocabulary_is_not_parsed(tmp_path):
    # What follows the vocabulary's opening brace is no JSON, and yet the kind is told.
    head = '{"decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": {'
    (tmp_path / "tokenizer.json").write_text(head + "#" * 1000)
    assert kind_in_folder(tmp_path) == "byte-level BPE"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"model": 3}', b"{" * 5000])
def test_a_broken_file_has_no_kind(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert kind_in_folder(tmp_path) is None


def test_a_sentencepiece_model_alone(tmp_path):
    assert kind_in_folder(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert kind_in_folder(tmp_path) == "SentencePiece"


def test_the_small_model(mini):
    assert kind_in_folder(mini) == "byte-level BPE"


@pytest.mark.parametrize(("model", "kind"), [("gpt2", "byte-level BPE"), ("new", "new")])
def test_the_name_in_a_gguf(model, kind):
    assert kind_in_gguf(model) == kind
