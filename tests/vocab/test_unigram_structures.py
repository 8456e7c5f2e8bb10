"""XLM-R's and T5's unigram tokenizers as their tokenizer.json files say them, against llama.cpp."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2 as protobuf
from support.tokenizers_build import encode_all, write_folder
from support.tokenizers_llama import LlamaVocabulary
from support.tokenizers_spm import train
from support.tokenizers_text import PAGE

from quantcli.vocab import load_vocabulary

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
MERGE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
STRIP = {"type": "Strip", "strip_left": False, "strip_right": True}
METASPACE = {
    "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True,
}  # fmt: skip
SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]}


@cache
def _model() -> tuple[str, tuple[tuple[str, float], ...]]:
    """The normalization of SentencePiece's own making, and pieces in XLM-R's order."""
    model = protobuf.ModelProto()
    model.ParseFromString(
        train("unigram", size=1500, normalization_rule_name="nmt_nfkc",
              remove_extra_whitespaces=True)
    )  # fmt: skip
    first = [(text, 0.0) for text in ("<s>", "<pad>", "</s>", "<unk>")]
    normal = [(piece.piece, piece.score) for piece in model.pieces if piece.type == 1]
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    return charsmap, (*first, *normal)


def _tokenizer(normalizers: list[Any], pre: dict[str, Any]) -> dict[str, Any]:
    charsmap, pieces = _model()
    parts = [
        {"type": "Precompiled", "precompiled_charsmap": charsmap} if part == "charsmap" else part
        for part in normalizers
    ]
    special = [
        {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, (text, _) in enumerate(pieces[:4])
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": parts} if parts else None,
        "pre_tokenizer": pre,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
                               "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
        },
        "decoder": METASPACE,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": [list(piece) for piece in pieces],
                  "byte_fallback": False},
    }  # fmt: skip


CASES: dict[str, tuple[list[Any], dict[str, Any], str | None]] = {
    "split": (["charsmap"], SPLIT, None),
    "stripped": (["charsmap", STRIP, MERGE], METASPACE, None),
    "not stripped": (["charsmap", MERGE], METASPACE, "keeps one of the spaces at the end"),
    "no normalization": ([], SPLIT, "takes tabs, line ends and other white space for spaces"),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_are_the_tokenizers_own_or_it_is_said(name: str, tmp_path: Path) -> None:
    normalizers, pre, remark = CASES[name]
    made = _tokenizer(normalizers, pre)
    folder = write_folder(tmp_path / "m", tokenizer=made, tokenizer_config=NAMES)
    notes: list[str] = []
    keys = load_vocabulary(folder, {}, vocab_size=len(_model()[1]), on_note=notes.append)
    vocabulary = LlamaVocabulary(keys, tmp_path / "v.gguf")
    wanted = encode_all(made, PAGE, special=True)
    different = {
        key
        for key, text in PAGE.items()
        if vocabulary.encode(text, add_special=True) != wanted[key]
    }
    assert bool(different) == (remark is not None)
    assert len(notes) == len([remark] if remark else [])
    assert all(remark in note for note in notes if remark)
    # Ordinary prose is the same in any case.
    assert len(different) < len(PAGE) / 2
