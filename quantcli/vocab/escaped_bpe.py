"""BPE over text with ▁ for spaces whose merges are not SentencePiece's: trained as merges.

llama.cpp runs such merges on plain UTF-8, with byte tokens for characters that have none, and
splits at line breaks only: as the tokenizer "gemma4", which always adds BOS, and as "gpt2" with the
pre-tokenizer "sarvam-moe". It puts no space before the text, so a tokenizer that does is refused,
as is one that joins line breaks with other text.
"""

from __future__ import annotations

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue, array, text
from quantcli.vocab.added import added_tokens, put_added
from quantcli.vocab.files import TokenizerFiles, TokenizerJson
from quantcli.vocab.llama_cpp_limits import require_bytes
from quantcli.vocab.merges import bpe_vocab, read_merges, write_merges
from quantcli.vocab.pieces_json import is_byte
from quantcli.vocab.special import named_special_tokens, special_key_values
from quantcli.vocab.tokens import ADDED_SCORE, TokenList, TokenType, check_size
from quantcli.vocab.whitespace import Spaces

SHOWN = frozenset(
    {
        "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
        "<tool_response|>", '<|"|>',
    }
)  # fmt: skip
"""Special tokens of Gemma 4 that stand in its answers: a runtime's parser has to see them, so
they are USER_DEFINED, as in llama.cpp's converter."""


def escaped_bpe_key_values(
    files: TokenizerFiles, tokenizer: TokenizerJson, spaces: Spaces, size: int, name: str
) -> dict[str, MetaValue]:
    """The key-values of such a tokenizer; ``size`` is the number of embedding rows."""
    merges = read_merges(tokenizer.model, name)
    over_lines = next(
        (pair for pair in merges if len({c == "\n" for c in pair[0] + pair[1]}) == 2), None
    )
    reason = None
    if spaces.prefix:
        reason = "puts a space before the text"
    elif over_lines is not None:
        reason = f"joins line breaks with other text ({over_lines[0]!r} + {over_lines[1]!r})"
    if reason is not None:
        raise VocabularyError(
            f"{name}: the merges are not those of a SentencePiece model (some pairs of tokens that "
            f"make a token are not listed), and the tokenizer {reason}, which llama.cpp can only "
            "do for a SentencePiece model",
            hint="put the tokenizer.model beside it, if there is one",
        )
    vocab = bpe_vocab(tokenizer.model, name)
    check_size(max(vocab.values()), size, name)
    tokens = TokenList(size, name)
    named = named_special_tokens(files)
    for piece, number in vocab.items():
        kind = TokenType.BYTE if is_byte(piece) else TokenType.NORMAL
        tokens.put(number, piece, TokenType.CONTROL if piece in named else kind)
    added = added_tokens(files)
    put_added(tokens, added, sentencepiece=True)
    require_bytes(vocab, name)
    ids = vocab | {token.content: number for number, token in added.items() if number < size}
    special = special_key_values(files, ids, size)
    named_as = {"tokenizer.ggml.model": text("gpt2"), "tokenizer.ggml.pre": text("sarvam-moe")}
    if special["tokenizer.ggml.add_bos_token"].value:
        # As "gpt2" it would be the same ids; this name is what runtimes know Gemma 4 by.
        named_as = {"tokenizer.ggml.model": text("gemma4")}
        for number, token in added.items():
            if token.content in SHOWN and number < size:
                tokens.put(number, token.content, TokenType.USER_DEFINED, ADDED_SCORE)
    return {
        **named_as,
        **tokens.key_values(scores=False),
        "tokenizer.ggml.merges": array("str", write_merges(merges)),
        **special,
    }
