"""SentencePiece models trained on the spot, and the same models as ``tokenizer.json`` has them."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import sentencepiece
from sentencepiece import SentencePieceProcessor
from support.tokenizers_text import training_text

SPACE = "▁"


def train(kind: str, *, size: int = 2500, **options: Any) -> bytes:
    """A model as Llama's and Mistral's are made: no normalization, single digits, all spaces."""
    defaults: dict[str, Any] = {
        "byte_fallback": kind == "bpe",
        "character_coverage": 0.999,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 3,
        "num_threads": 1,
    }
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()),
        model_writer=out,
        model_type=kind,
        vocab_size=size,
        **(defaults | options),
    )
    return out.getvalue()


def pieces(model: bytes) -> list[tuple[str, float]]:
    """Each piece's text and score by id."""
    processor = SentencePieceProcessor(model_proto=model)
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]


def bpe_json(
    model: bytes,
    *,
    normalizer: Mapping[str, Any] | None = None,
    pre_tokenizer: Mapping[str, Any] | None = None,
    added: Sequence[tuple[str, bool]] = (),
) -> dict[str, Any]:
    """A BPE ``model`` as merges: every pair of pieces that makes a piece, best piece first."""
    scored = pieces(model)
    processor = SentencePieceProcessor(model_proto=model)
    normal = {
        piece: score
        for number, (piece, score) in enumerate(scored)
        if not (
            processor.is_byte(number)
            or processor.is_control(number)
            or processor.is_unknown(number)
        )
    }
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    merges.sort(key=lambda merge: -merge[0])
    vocab = {piece: number for number, (piece, _) in enumerate(scored)}
    free = itertools.count(len(vocab))
    return {
        "version": "1.0",
        "added_tokens": [added_token(vocab[name], name) for name in ("<unk>", "<s>", "</s>")]
        + [
            added_token(vocab[name] if name in vocab else next(free), name, special=special)
            for name, special in added
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in merges],
        },
    }


def unigram_json(model: bytes, *, charsmap: bytes = b"", merged: bool = False) -> dict[str, Any]:
    """A unigram ``model`` with T5's normalizer and pre-tokenizer."""
    parts: list[dict[str, Any]] = []
    if charsmap:
        encoded = base64.b64encode(charsmap).decode()
        parts.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if merged:
        parts.append({"type": "Strip", "strip_left": False, "strip_right": True})
        parts.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE})
    return {
        "version": "1.0",
        "added_tokens": [
            added_token(number, name) for number, name in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": {"type": "Sequence", "normalizers": parts} if parts else None,
        "pre_tokenizer": metaspace("always"),
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [list(piece) for piece in pieces(model)],
            "byte_fallback": False,
        },
    }


def added_token(
    number: int, content: str, *, special: bool = True, **flags: bool
) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **plain, **flags}


def metaspace(scheme: str, *, split: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND_AND_REPLACE = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE],
}
SPLIT_AT_SPACES = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
