"""Files that are missing, cut off or not what their name says: each has its own sentence."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizers_build import byte_level, train_byte_level, write_folder
from support.tokenizers_spm import train

from quantcli.errors import VocabularyError
from quantcli.vocab import load_vocabulary
from quantcli.vocab.protobuf import read_fields
from quantcli.vocab.sentencepiece_model import read_model

TOKENIZER = train_byte_level(byte_level(use_regex=True), size=400)


def load(folder: Path) -> None:
    load_vocabulary(folder, {}, vocab_size=500)


def test_no_tokenizer_says_what_is_looked_for(tmp_path: Path):
    with pytest.raises(
        VocabularyError,
        match=r"has no tokenizer: looked for tokenizer\.json, tokenizer\.model",
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["vocab__json", "merges__txt"])
def test_other_files_alone_say_how_to_make_a_tokenizer_json(name: str, tmp_path: Path):
    write_folder(tmp_path, **{name: "x"})
    with pytest.raises(
        VocabularyError, match=f"has {name.replace('__', '.')}.* but none of"
    ) as error:
        load(tmp_path)
    assert error.value.hint is not None
    assert "save_pretrained" in error.value.hint


JSON_FILES = (
    "tokenizer", "tokenizer_config", "special_tokens_map", "generation_config", "added_tokens",
)  # fmt: skip


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": }', b"nul"])
def test_invalid_json_names_the_file(name: str, content: bytes, tmp_path: Path):
    write_folder(tmp_path, tokenizer=TOKENIZER)
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(VocabularyError, match=rf"{name}\.json is not valid JSON"):
        load(tmp_path)


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_of_another_type_names_the_file(name: str, tmp_path: Path):
    write_folder(tmp_path, tokenizer=TOKENIZER)
    (tmp_path / f"{name}.json").write_text("[1]")
    with pytest.raises(VocabularyError, match=rf"{name}\.json has not the form it should have"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("broken", "place"),
    [
        ({"model": {"vocab": {"a": "b"}}}, r"\$\.model\.vocab"),
        ({"model": {"vocab": {"a": 1}, "merges": [["a"]]}}, r"\$\.model\.merges\[0\]"),
        ({"model": {}}, "missing required field `vocab`"),
        ({}, "missing required field `model`"),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}, "missing required field `content`"),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": "1", "content": ""}]}, r"\[0\]\.id"),
        ({"model": {"vocab": {}}, "pre_tokenizer": 3}, r"\$\.pre_tokenizer"),
        ({"model": {"vocab": {}, "ignore_merges": "yes"}}, r"\$\.model\.ignore_merges"),
    ],
)
def test_a_wrong_type_names_its_place(broken: dict[str, Any], place: str, tmp_path: Path):
    write_folder(tmp_path, tokenizer=broken)
    with pytest.raises(VocabularyError, match=place):
        load(tmp_path)


@pytest.mark.parametrize(
    "decoder", [[1], {"x": {"content": "a"}}, {"7": "a"}, {"7": {"content": 1}}]
)
def test_added_tokens_decoder_of_another_form(decoder: Any, tmp_path: Path):
    write_folder(tmp_path, tokenizer=TOKENIZER, tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(VocabularyError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        load(tmp_path)


def test_an_added_token_with_a_negative_id(tmp_path: Path):
    write_folder(tmp_path, tokenizer=TOKENIZER, added_tokens={"x": -1})
    with pytest.raises(VocabularyError, match=r"added_tokens\.json: token 'x' has the id -1"):
        load(tmp_path)


def test_a_lone_surrogate_is_not_text(tmp_path: Path):
    write_folder(tmp_path, tokenizer__json='{"model": {"vocab": {"\\ud800": 0}}}')
    with pytest.raises(VocabularyError, match=r"tokenizer\.json is not valid JSON"):
        load(tmp_path)


def message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A Protocol Buffers message, for field numbers below 16 and lengths below 128."""
    parts = []
    for number, value in fields:
        if isinstance(value, float):
            parts.append(bytes([number << 3 | 5]) + struct.pack("<f", value))
        elif isinstance(value, int):
            parts.append(bytes([number << 3, value]))
        else:
            parts.append(bytes([number << 3 | 2, len(value)]) + value)
    return b"".join(parts)


PIECES = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("▁a", 1)]
MODEL = message(
    *((1, message((1, text.encode()), (2, -1.5), (3, kind))) for text, kind in PIECES),
    (2, message((3, 2))),
    (3, message((1, b"identity"), (2, b"\1\2"), (3, 0))),
)


def test_fields_have_their_meaning_and_their_defaults(tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODEL)
    model = read_model(path)
    assert [(piece.text, piece.score, int(piece.kind)) for piece in model.pieces.values()] == [
        (text, -1.5, kind) for text, kind in PIECES
    ]
    assert not model.unigram
    assert (model.add_space_prefix, model.remove_extra_whitespaces) == (False, True)
    assert (model.charsmap, model.normalization) == (b"\1\2", "identity")
    assert model.special == {"unk": 0, "bos": 1, "eos": 2}


def test_fields_that_are_not_known_are_passed_over(tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    fixed64 = bytes([12 << 3 | 1]) + bytes(8)
    path.write_bytes(MODEL + message((4, b"self test"), (9, 7), (11, 1.0)) + fixed64)
    assert len(read_model(path).pieces) == len(PIECES)


BROKEN_MODELS = {
    "empty": (b"", "no pieces"),
    "text": (b"hello, this is not a model", "is not a SentencePiece model"),
    "cut off": (MODEL[:-3], "runs past the end"),
    "cut in a number": (b"\x0a\xff", "a number that runs past the end"),
    "long number": (b"\x0a" + b"\xff" * 11, "more than ten bytes"),
    "group": (b"\x0b", "wire type 3"),
    "field 0": (b"\x02\x00", "field number 0"),
    "piece is a number": (b"\x08\x01", "text that is a number"),
    "score is text": (b"\x0a\x05\x0a\x01a\x12\x00", "not a 32-bit float"),
    "type is text": (b"\x0a\x05\x0a\x01a\x1a\x00", "not an integer"),
    "type is unknown": (b"\x0a\x05\x0a\x01a\x18\x09", "9 is not a valid TokenType"),
    "not UTF-8": (b"\x0a\x03\x0a\x01\xff", "can't decode byte 0xff"),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_each_broken_model_has_its_sentence(name: str, tmp_path: Path):
    content, sentence = BROKEN_MODELS[name]
    write_folder(tmp_path, tokenizer__model=content)
    with pytest.raises(VocabularyError, match=sentence) as error:
        load(tmp_path)
    assert str(tmp_path / "tokenizer.model") in error.value.message


WHOLE = train("bpe", size=800)


@given(st.integers(0, len(WHOLE) - 1))
def test_a_model_cut_anywhere_is_refused_or_whole_up_to_there(cut: int):
    try:
        fields = list(read_fields(WHOLE[:cut]))
    except ValueError:
        return
    assert fields == list(read_fields(WHOLE))[: len(fields)]


@given(st.binary(max_size=64))
def test_any_bytes_are_fields_or_a_value_error(data: bytes):
    try:
        fields = list(read_fields(data))
    except ValueError:
        return
    assert all(number > 0 and isinstance(value, int | bytes) for number, value in fields)
