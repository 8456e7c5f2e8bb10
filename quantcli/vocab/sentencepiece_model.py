"""A SentencePiece model, whether from ``tokenizer.model`` or from ``tokenizer.json``.

BPE joins the two neighbours whose joint piece has the highest score; Unigram takes the cut of the
text whose pieces have the highest sum of scores. ``read_model`` reads the protobuf ModelProto
(sentencepiece_model.proto of google/sentencepiece).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from quantcli.errors import VocabularyError
from quantcli.vocab.protobuf import Field, as_bytes, as_float, as_int, read_fields
from quantcli.vocab.tokens import TokenType
from quantcli.whole_files import read_whole

_UNIGRAM, _BPE = 1, 2
_ALGORITHMS = {_UNIGRAM: "unigram", _BPE: "BPE", 3: "word", 4: "char"}


class VocabularyPiece(NamedTuple):
    """A piece's text (▁ for a space), score and type."""

    text: str
    score: float
    kind: TokenType


@dataclass(frozen=True, slots=True)
class PieceModel:
    """Pieces by id and what is done to text before it is cut into them.

    ``charsmap`` is SentencePiece's precompiled normalization; ``special`` the ids of unk, bos,
    eos and pad as the model itself has them; ``never_found`` are added tokens of ``tokenizer.json``
    that no text contains by the time they are looked for.
    """

    file: str
    unigram: bool
    pieces: Mapping[int, VocabularyPiece]
    byte_fallback: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    normalization: str = ""
    special: Mapping[str, int] = field(default_factory=dict)
    never_found: frozenset[str] = frozenset()


def read_model(path: Path) -> PieceModel:
    """Read a ``tokenizer.model``; VocabularyError where it is none or needs what is not here."""
    try:
        data = read_whole(path)
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}") from error
    pieces: dict[int, VocabularyPiece] = {}
    trainer: dict[int, Field] = {}
    normalizer: dict[int, Field] = {}
    try:
        for number, value in read_fields(data):
            if number == 1:
                pieces[len(pieces)] = _read_piece(as_bytes(value))
            elif number == 2:
                trainer = dict(read_fields(as_bytes(value)))
            elif number == 3:
                normalizer = dict(read_fields(as_bytes(value)))
        algorithm = as_int(trainer.get(3, _UNIGRAM))
        if not pieces:
            raise ValueError("no pieces")
        model = PieceModel(
            file=str(path),
            unigram=algorithm == _UNIGRAM,
            pieces=pieces,
            byte_fallback=bool(trainer.get(35, False)),
            add_space_prefix=bool(normalizer.get(3, True)),
            remove_extra_whitespaces=bool(normalizer.get(4, True)),
            charsmap=as_bytes(normalizer.get(2, b"")),
            normalization=as_bytes(normalizer.get(1, b"")).decode(),
            special=_special_ids(trainer, len(pieces)),
        )
    except ValueError as error:  # UnicodeDecodeError is one
        raise VocabularyError(f"{path} is not a SentencePiece model: {error}") from error
    if algorithm not in (_UNIGRAM, _BPE):
        raise VocabularyError(
            f"{path} is a SentencePiece model of type {_ALGORITHMS.get(algorithm, algorithm)}; "
            "llama.cpp has only BPE and unigram"
        )
    if trainer.get(24) or not normalizer.get(5, True):
        raise VocabularyError(
            f"{path} writes spaces as a suffix of words or not at all, which llama.cpp does not do"
        )
    return model


def _read_piece(data: bytes) -> VocabularyPiece:
    fields = dict(read_fields(data))
    return VocabularyPiece(
        as_bytes(fields.get(1, b"")).decode(),
        as_float(fields[2]) if 2 in fields else 0.0,
        TokenType(as_int(fields.get(3, TokenType.NORMAL))),
    )


def _special_ids(trainer: Mapping[int, Field], count: int) -> dict[str, int]:
    fields = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
    ids = {role: as_int(trainer.get(number, default))
           for role, (number, default) in fields.items()}  # fmt: skip
    return {role: number for role, number in ids.items() if 0 <= number < count}
