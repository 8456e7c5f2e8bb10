"""What llama.cpp's SentencePiece tokenizers cannot do, found before a model is converted for them.

"llama" (BPE) neither normalizes text nor drops spaces nor splits it, and ends the process at a
character that has neither a token nor byte tokens; "t5" (unigram) has no byte tokens.
"""

from __future__ import annotations

from collections.abc import Container

from quantcli.errors import VocabularyError
from quantcli.vocab.added import SPACE
from quantcli.vocab.files import TokenizerJson
from quantcli.vocab.sentencepiece_model import PieceModel
from quantcli.vocab.tokens import TokenType
from quantcli.vocab.whitespace import Spaces

_HINT = "--pre default takes llama.cpp's way"
_NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


def check_spaces(tokenizer: TokenizerJson, spaces: Spaces, name: str) -> None:
    """Refuse what the tokenizer does to text and llama.cpp does not."""
    if spaces.other:
        raise VocabularyError(
            f"{name}: the tokenizer uses {', '.join(spaces.other)}, which llama.cpp does not do "
            "for a SentencePiece model",
            hint="--pre default leaves it out",
        )
    vocab = tokenizer.model.vocab
    texts = vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab]
    across = next((piece for piece in texts if SPACE in piece[1:]), None) if spaces.split else None
    if across is not None:
        raise VocabularyError(
            f"{name}: text is split at spaces first, so the piece {across!r} is never used, but "
            "llama.cpp does not split and would use it",
            hint=_HINT,
        )


def check_model(model: PieceModel) -> None:
    """Refuse a model whose normalization or byte fallback llama.cpp would leave out."""
    spaces = next(
        (
            piece.text
            for piece in model.pieces.values()
            if piece.kind is TokenType.USER_DEFINED and SPACE in piece.text
        ),
        None,
    )
    if spaces is not None and model.add_space_prefix:
        raise VocabularyError(
            f"{model.file}: the user-defined piece {spaces!r} stands for spaces, and llama.cpp "
            "puts one more space after a user-defined piece",
            hint=_HINT,
        )
    if model.unigram:
        if model.byte_fallback:
            raise VocabularyError(
                f"{model.file}: a unigram model with byte fallback; llama.cpp's has none and "
                "gives the unknown token for a character without a piece",
                hint=_HINT,
            )
        return
    if model.charsmap:
        raise VocabularyError(
            f"{model.file}: text is normalized ({model.normalization or 'precompiled charsmap'}), "
            "which llama.cpp does not do for a SentencePiece BPE model",
            hint=_HINT,
        )
    if model.remove_extra_whitespaces:
        raise VocabularyError(
            f"{model.file}: runs of spaces become one, which llama.cpp does not do for a "
            "SentencePiece BPE model",
            hint=_HINT,
        )


def require_bytes(texts: Container[str], file: str) -> None:
    """Refuse tokens that leave a byte of UTF-8 text without one."""
    missing = [
        byte
        for byte in range(256)
        if byte not in _NEVER_IN_UTF8
        and f"<0x{byte:02X}>" not in texts
        and not (byte < 0x80 and (SPACE if byte == 0x20 else chr(byte)) in texts)
    ]
    if missing:
        raise VocabularyError(
            f"{file}: {len(missing)} bytes have no token (the first is <0x{missing[0]:02X}>), and "
            "llama.cpp needs them for characters that are not tokens"
        )
