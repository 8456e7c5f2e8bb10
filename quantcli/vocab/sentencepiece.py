"""SentencePiece models: llama.cpp's tokenizers "llama" (BPE) and "t5" (unigram).

``tokenizer.json`` decides where there is one, because it is what transformers runs; a
``tokenizer.model`` beside it gives the scores when the merges cannot (see ``piece_order``).
llama.cpp's "llama" neither normalizes text nor drops spaces, and ends the process at a character
without piece and byte tokens; "t5" has no byte tokens. What would be tokenized differently is
refused, and ``pre="default"`` takes llama.cpp's way all the same where that is possible.
"""

from __future__ import annotations

from quantcli.errors import UsageError, VocabularyError
from quantcli.types import MetaValue, array, boolean, text
from quantcli.vocab.added import SPACE, added_tokens, put_added
from quantcli.vocab.escaped_bpe import escaped_bpe_key_values
from quantcli.vocab.files import TokenizerFiles
from quantcli.vocab.llama_cpp_limits import check_model, check_spaces, require_bytes
from quantcli.vocab.pieces_json import bpe_from_json, check_same_pieces, unigram_from_json
from quantcli.vocab.sentencepiece_model import PieceModel, read_model
from quantcli.vocab.special import named_special_tokens, special_key_values
from quantcli.vocab.template import begins_with_special
from quantcli.vocab.tokens import TokenList, TokenType, check_size
from quantcli.vocab.whitespace import prefix_scheme, read_spaces


def sentencepiece_key_values(
    files: TokenizerFiles, size: int, pre: str | None
) -> dict[str, MetaValue]:
    """The key-values of a SentencePiece model; ``size`` is the number of embedding rows."""
    if pre not in (None, "default"):
        raise UsageError(
            f"--pre {pre} is for byte-level BPE, but the tokenizer in {files.folder} is a "
            "SentencePiece model",
            hint="leave --pre out",
        )
    strict = pre is None
    if files.tokenizer is None:
        if files.model is None:
            raise VocabularyError(f"{files.folder} has no tokenizer")
        model = read_model(files.model)
    else:
        name = files.path("tokenizer.json")
        spaces = read_spaces(files.tokenizer, name)
        if strict:
            check_spaces(files.tokenizer, spaces, name)
        if isinstance(files.tokenizer.model.vocab, list):
            model = unigram_from_json(files.tokenizer, spaces, name)
        elif (found := bpe_from_json(files, files.tokenizer, spaces, name)) is not None:
            model = found
        elif files.model is not None:
            model = read_model(files.model)
            check_same_pieces(model, files, files.tokenizer, name)
        else:
            return escaped_bpe_key_values(files, files.tokenizer, spaces, size, name)
    if strict:
        check_model(model)
    return _key_values(files, model, size)


def _key_values(files: TokenizerFiles, model: PieceModel, size: int) -> dict[str, MetaValue]:
    if not model.unigram:
        require_bytes({piece.text for piece in model.pieces.values()}, model.file)
    check_size(max(model.pieces), size, model.file)
    tokens = TokenList(size, model.file)
    named = named_special_tokens(files)
    for number, (piece, score, kind) in model.pieces.items():
        if kind is TokenType.NORMAL and piece in named:
            kind = TokenType.CONTROL
        elif kind is TokenType.USER_DEFINED and " " in piece:
            # SentencePiece looks for it after spaces have become ▁, and so never finds it.
            kind = TokenType.UNUSED
        elif kind is TokenType.USER_DEFINED:
            piece = piece.replace(SPACE, " ")
        tokens.put(number, piece, kind, score)
    added = {
        number: token
        for number, token in added_tokens(files).items()
        if token.content not in model.never_found
    }
    put_added(tokens, added, sentencepiece=True, replace=model.file == str(files.model))
    # A prefix for a text's first word alone is one that a chat never has, but for its first token.
    first_only = files.tokenizer is not None and prefix_scheme(files.tokenizer) == "first"
    special = [token.content for token in added.values() if token.special]
    in_chats = first_only and begins_with_special(files, special)
    ids = {piece.text: number for number, piece in model.pieces.items()}
    ids |= {token.content: number for number, token in added.items() if number < size}
    result = {
        "tokenizer.ggml.model": text("t5" if model.unigram else "llama"),
        "tokenizer.ggml.pre": text("default"),
        **tokens.key_values(scores=True),
        "tokenizer.ggml.add_space_prefix": boolean(model.add_space_prefix and not in_chats),
    }
    if model.unigram:
        result["tokenizer.ggml.remove_extra_whitespaces"] = boolean(model.remove_extra_whitespaces)
        if model.charsmap:
            result["tokenizer.ggml.precompiled_charsmap"] = array("u8", list(model.charsmap))
    result |= special_key_values(files, ids, size, defaults=model.special)
    if files.tokenizer is None:
        # What LlamaTokenizer does when nothing is said; the runtime's default for "t5" differs.
        result.setdefault("tokenizer.ggml.add_bos_token", boolean("bos" in model.special))
        result.setdefault("tokenizer.ggml.add_eos_token", boolean(False))
    return result
