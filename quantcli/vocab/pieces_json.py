"""A SentencePiece model out of ``tokenizer.json``, where it stands as merges or scored pieces."""

from __future__ import annotations

import re

from quantcli.errors import VocabularyError
from quantcli.vocab.added import SPACE, added_tokens
from quantcli.vocab.files import TokenizerFiles, TokenizerJson
from quantcli.vocab.merges import bpe_vocab, read_merges
from quantcli.vocab.piece_order import piece_scores
from quantcli.vocab.sentencepiece_model import PieceModel, VocabularyPiece
from quantcli.vocab.tokens import TokenType
from quantcli.vocab.whitespace import Spaces

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def is_byte(piece: str) -> bool:
    """Whether ``piece`` is a token for one byte, as ``<0x0A>``."""
    return _BYTE.fullmatch(piece) is not None


def unigram_from_json(tokenizer: TokenizerJson, spaces: Spaces, name: str) -> PieceModel:
    """The unigram model of ``tokenizer``; its unknown piece is required."""
    vocab = tokenizer.model.vocab
    unknown = tokenizer.model.unk_id
    if not isinstance(vocab, list) or not vocab:
        raise VocabularyError(f"{name}: the unigram model has no pieces")
    if unknown is None or not 0 <= unknown < len(vocab):
        raise VocabularyError(f"{name}: the unigram model has no unk_id, which llama.cpp needs")
    pieces = {
        number: VocabularyPiece(piece, score,
                      TokenType.UNKNOWN if number == unknown else TokenType.NORMAL)
        for number, (piece, score) in enumerate(vocab)
    }  # fmt: skip
    return PieceModel(
        file=name, unigram=True, pieces=pieces, byte_fallback=tokenizer.model.byte_fallback,
        add_space_prefix=spaces.prefix, remove_extra_whitespaces=spaces.merged,
        charsmap=spaces.charsmap, special={"unk": unknown},
    )  # fmt: skip


def bpe_from_json(
    files: TokenizerFiles, tokenizer: TokenizerJson, spaces: Spaces, name: str
) -> PieceModel | None:
    """The BPE model of ``tokenizer``; None where its merges are not those of pieces."""
    vocab = bpe_vocab(tokenizer.model, name)
    merges = read_merges(tokenizer.model, name)
    added = added_tokens(files).values()
    by_byte = {piece for piece in vocab if is_byte(piece)}
    unknown = tokenizer.model.unk_token
    special = by_byte | {token.content for token in added} | {unknown or ""}
    # Looked for before spaces become ▁, so such a token is in truth made by merges alone.
    never_found = frozenset(
        token.content
        for token in added
        if SPACE in token.content and not token.normalized and not token.special
    )
    scores = piece_scores(vocab, merges, special - never_found)
    if scores is None:
        never_found = frozenset()
        scores = piece_scores(vocab, merges, special)
    if scores is None:
        return None

    def kind(piece: str) -> TokenType:
        if piece == unknown:
            return TokenType.UNKNOWN
        return TokenType.BYTE if piece in by_byte else TokenType.NORMAL

    return PieceModel(
        file=name, unigram=False, byte_fallback=tokenizer.model.byte_fallback,
        pieces={number: VocabularyPiece(piece, scores.get(piece, 0.0), kind(piece))
                for piece, number in vocab.items()},
        add_space_prefix=spaces.prefix, remove_extra_whitespaces=spaces.merged,
        charsmap=spaces.charsmap,
        special={} if unknown is None or unknown not in vocab else {"unk": vocab[unknown]},
        never_found=never_found,
    )  # fmt: skip


def check_same_pieces(
    model: PieceModel, files: TokenizerFiles, tokenizer: TokenizerJson, name: str
) -> None:
    """Refuse a ``tokenizer.model`` that is not the one ``tokenizer.json`` was made from."""
    added = added_tokens(files)
    for piece, number in bpe_vocab(tokenizer.model, name).items():
        other = model.pieces.get(number)
        if number not in added and (other is None or other.text != piece):
            raise VocabularyError(
                f"{name} has {piece!r} as token {number}, where {model.file} has "
                f"{other.text!r}" if other is not None else
                f"{name} has {piece!r} as token {number}, which {model.file} has not",
                hint="remove the file that does not belong to the model",
            )  # fmt: skip
