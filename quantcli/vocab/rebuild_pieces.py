"""A SentencePiece BPE out of a GGUF: its scores become merges, best piece first.

llama.cpp joins the two neighbours whose joint text is the piece with the highest score; a BPE of
``tokenizer.json`` joins the pair that stands first in its list. So every pair of pieces that makes
a piece is listed, by falling score, and pairs that make one piece stand together: the order that
`quantcli.vocab.piece_order` reads back, and that transformers writes for a ``tokenizer.model``.

Where pieces share a score, llama.cpp takes the leftmost pair and a list cannot say so: a remark.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.vocab.added import SPACE
from quantcli.vocab.gguf_vocabulary import GgufVocabulary
from quantcli.vocab.tokens import TokenType


def piece_parts(vocab: GgufVocabulary) -> tuple[dict[str, Any], list[str]]:
    """``model``, ``normalizer``, ``pre_tokenizer`` and ``decoder``, and remarks."""
    scores = vocab.keys.get("scores") or []
    if len(scores) != len(vocab.tokens):
        raise VocabularyError(
            f"{vocab.file}: {len(vocab.tokens)} pieces but {len(scores)} scores, without which "
            "their order is not known"
        )
    normal = {
        text: float(score)
        for text, kind, score in zip(vocab.tokens, vocab.kinds, scores, strict=True)
        if kind == TokenType.NORMAL
    }
    merges, ties = piece_merges(normal)
    prefix = bool(vocab.keys.get("add_space_prefix", True))
    unknown = next(
        (text for text, kind in zip(vocab.tokens, vocab.kinds, strict=True)
         if kind == TokenType.UNKNOWN),
        None,
    )  # fmt: skip
    notes = []
    if ties:
        notes.append(
            f"{ties} pieces share their score with another, so texts in which two such pieces "
            "compete may be tokenized otherwise than llama.cpp does"
        )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab.ids(),
            "merges": merges,
        },
    }, notes


def piece_merges(scores: Mapping[str, float]) -> tuple[list[list[str]], int]:
    """Pairs of pieces that make a piece, best first, and how many made pieces share a score."""
    merges: list[list[str]] = []
    seen: dict[float, int] = {}
    # Python's sort is stable, so pieces of one score stay in the order of their ids.
    for piece, score in sorted(scores.items(), key=lambda item: -item[1]):
        pairs = [
            [piece[:cut], piece[cut:]]
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ]
        if pairs:
            seen[score] = seen.get(score, 0) + 1
            merges += pairs
    return merges, sum(count for count in seen.values() if count > 1)
