"""Byte-level BPE (GPT-2, Llama 3, Qwen, Mistral's tekken ...): llama.cpp's tokenizer "gpt2".

Everything is in ``tokenizer.json``: the vocabulary in GPT-2's byte alphabet, the merges, and the
pre-tokenizer, whose structure gives the name that llama.cpp splits by. NFC normalization is
accepted though llama.cpp does not normalize: text in NFC, which is nearly all text, is not
changed by it. Any other normalizer changes ordinary text and is refused, as are suffixes or
prefixes of words, which llama.cpp has not; ``pre`` overrides what is said of normalizer and
pre-tokenizer.
"""

from __future__ import annotations

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue, array, text
from quantcli.vocab.added import added_tokens, put_added
from quantcli.vocab.files import ModelPart, TokenizerFiles, TokenizerJson
from quantcli.vocab.merges import bpe_vocab, make_every_token, read_merges, write_merges
from quantcli.vocab.normalizer import normalizer_key_values, normalizer_parts
from quantcli.vocab.pretokenizer_steps import BYTES, read_steps
from quantcli.vocab.pretokenizers import check_name, recognise
from quantcli.vocab.special import named_special_tokens, special_key_values
from quantcli.vocab.tokens import TokenList, TokenType, check_size

ALPHABET = frozenset(
    chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))
)
"""The 256 characters that stand for bytes: printable ones for themselves, others from U+0100."""


def is_byte_level(tokenizer: TokenizerJson) -> bool:
    """Whether text reaches the model as bytes in GPT-2's alphabet."""
    return any(step.startswith(BYTES) for step in read_steps(tokenizer.pre_tokenizer))


def byte_bpe_key_values(
    files: TokenizerFiles, tokenizer: TokenizerJson, size: int, pre: str | None
) -> dict[str, MetaValue]:
    """The key-values of a byte-level BPE; ``size`` is the number of rows of the embedding."""
    name = files.path(tokenizer.file)
    model = tokenizer.model
    vocab = bpe_vocab(model, name)
    merges = read_merges(model, name)
    if not merges:
        raise VocabularyError(f"{name}: the BPE model has no merges")
    added = added_tokens(files)
    named = named_special_tokens(files)
    pre = pre or tokenizer.pre
    if pre is None and tokenizer.file not in ("tokenizer.json", "tekken.json"):
        raise VocabularyError(
            f"{name}: a tiktoken file does not say how words are split",
            hint="--pre NAME says it, in llama.cpp's names; 'llama-bpe' for Llama 3",
        )
    if pre is None:
        _check_model(model, name)
        _check_normalizer(tokenizer, name)
        pre = recognise(
            read_steps(tokenizer.pre_tokenizer),
            ignore_merges=model.ignore_merges,
            merges_make_every_token=lambda: make_every_token(
                vocab, merges, {*named, *(token.content for token in added.values())}
            ),
            file=name,
        )
    else:
        check_name(pre)
    check_size(max(vocab.values(), default=-1), size, name)
    tokens = TokenList(size, name)
    for token, number in vocab.items():
        tokens.put(number, token, TokenType.CONTROL if token in named else TokenType.NORMAL)
    nfc = any(part.get("type") == "NFC" for part in normalizer_parts(tokenizer.normalizer))
    put_added(tokens, added, nfc=nfc)
    ids = vocab | {token.content: number for number, token in added.items() if number < size}
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(pre),
        **tokens.key_values(scores=False),
        "tokenizer.ggml.merges": array("str", write_merges(merges)),
        **special_key_values(files, ids, size),
        **normalizer_key_values(tokenizer.normalizer),
    }


def _check_model(model: ModelPart, name: str) -> None:
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        raise VocabularyError(
            f"{name}: the BPE model marks parts of words with "
            f"{model.continuing_subword_prefix or model.end_of_word_suffix!r}, which llama.cpp "
            "does not do"
        )
    missing = ALPHABET.difference(model.vocab)
    if missing and (model.unk_token is not None or model.byte_fallback):
        raise VocabularyError(
            f"{name}: {len(missing)} of the 256 bytes have no token (the first is "
            f"{min(missing)!r}), and llama.cpp drops such bytes where the tokenizer has "
            f"{model.unk_token or 'byte tokens'!r} for them"
        )


def _check_normalizer(tokenizer: TokenizerJson, name: str) -> None:
    for part in normalizer_parts(tokenizer.normalizer):
        if part.get("type") != "NFC":
            raise VocabularyError(
                f"{name}: text is normalized with {part.get('type')}, which llama.cpp does not do "
                "for byte-level BPE",
                hint="--pre NAME leaves it out",
            )
