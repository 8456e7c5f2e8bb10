"""WordPiece, the tokenizer of BERT and its kin: llama.cpp's "bert".

A word is cut into the longest known pieces from its start. BERT marks the pieces inside of a word
with ##; llama.cpp marks those that begin one with ▁. Text is normalized and cut into words by
fixed rules in both (BertNormalizer, BertPreTokenizer); what deviates from them is refused. A word
of more than ``max_input_chars_per_word`` characters is unknown to the tokenizer alone.
Source: arXiv:1810.04805; ``llm_tokenizer_wpm_session`` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.errors import UsageError, VocabularyError
from quantcli.types import MetaValue, boolean, text
from quantcli.vocab.added import SPACE, added_tokens, put_added
from quantcli.vocab.files import AddedToken, ModelPart, TokenizerFiles, TokenizerJson
from quantcli.vocab.special import named_special_tokens, special_key_values
from quantcli.vocab.tokens import TokenList, TokenType, check_size
from quantcli.whole_files import read_whole

_INSIDE = "##"


def wordpiece_key_values(
    files: TokenizerFiles, tokenizer: TokenizerJson, size: int, pre: str | None
) -> dict[str, MetaValue]:
    """The key-values of a WordPiece tokenizer; ``size`` is the number of embedding rows."""
    if pre not in (None, "default"):
        raise UsageError(
            f"--pre {pre} is for byte-level BPE, but the tokenizer in {files.folder} is WordPiece",
            hint="leave --pre out",
        )
    name = files.path(tokenizer.file)
    lowercase, strip_accents = _read_normalizer(tokenizer, name)
    vocab = tokenizer.model.vocab
    if not isinstance(vocab, dict) or not vocab:
        raise VocabularyError(f"{name}: the WordPiece model has no vocabulary")
    prefix = tokenizer.model.continuing_subword_prefix
    if prefix not in (None, _INSIDE):
        raise VocabularyError(
            f"{name}: pieces inside of words begin with {prefix!r}, not {_INSIDE}"
        )
    unknown = tokenizer.model.unk_token or "[UNK]"
    if unknown not in vocab:
        raise VocabularyError(f"{name}: the unknown token {unknown!r} is not in the vocabulary")
    check_size(max(vocab.values()), size, name)
    added = added_tokens(files)
    special = named_special_tokens(files) | {t.content for t in added.values()} | {unknown}
    tokens = TokenList(size, name)
    for piece, number in vocab.items():
        if piece in special:
            tokens.put(number, piece, TokenType.CONTROL)
        elif piece.startswith(_INSIDE):
            tokens.put(number, piece.removeprefix(_INSIDE), TokenType.NORMAL)
        else:
            tokens.put(number, SPACE + piece, TokenType.NORMAL)
    put_added(tokens, added)
    ids = vocab | {token.content: number for number, token in added.items() if number < size}
    keys = {
        "tokenizer.ggml.model": text("bert"),
        "tokenizer.ggml.pre": text("default"),
        **tokens.key_values(scores=False),
        "tokenizer.ggml.normalizer.lowercase": boolean(lowercase),
        "tokenizer.ggml.normalizer.strip_accents": boolean(strip_accents),
    }
    return keys | special_key_values(files, ids, size, defaults={"unk": vocab[unknown]})


_ROLES = ("unk", "cls", "sep", "pad", "mask")


def word_names() -> dict[str, str]:
    """The special tokens' texts, where tokenizer_config.json names none."""
    return {f"{role}_token": f"[{role.upper()}]" for role in _ROLES}


def read_words(path: Path, settings: Mapping[str, Any]) -> TokenizerJson:
    """BERT's vocab.txt, a piece a line, as the ``tokenizer.json`` that transformers makes of it."""
    try:
        lines = read_whole(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{path} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}") from error
    vocab = {line: number for number, line in enumerate(lines)}
    special = {role: str(settings[f"{role}_token"]) for role in _ROLES}
    start, end = ({"SpecialToken": {"id": special[role]}} for role in ("cls", "sep"))
    one = [start, {"Sequence": {"id": "A"}}, end]
    return TokenizerJson(
        ModelPart(vocab, "WordPiece", unk_token=special["unk"]),
        [AddedToken(vocab[t], t, True, False) for t in special.values() if t in vocab],
        {
            "type": "BertNormalizer",
            "lowercase": bool(settings.get("do_lower_case", True)),
            "strip_accents": settings.get("strip_accents"),
            "handle_chinese_chars": bool(settings.get("tokenize_chinese_chars", True)),
        },
        {"type": "BertPreTokenizer"},
        {
            "type": "TemplateProcessing",
            "single": one,
            "pair": [*one, {"Sequence": {"id": "B"}}, end],
        },
        path.name,
    )


def _read_normalizer(tokenizer: TokenizerJson, name: str) -> tuple[bool, bool]:
    """Whether text becomes lower-case, and loses its accents."""
    normalizer: dict[str, Any] = tokenizer.normalizer or {}
    splitter: dict[str, Any] = tokenizer.pre_tokenizer or {}
    for part, kind in ((normalizer, "BertNormalizer"), (splitter, "BertPreTokenizer")):
        if part.get("type") != kind:
            raise VocabularyError(
                f"{name}: a WordPiece model with {part.get('type') or 'nothing'} in place of "
                f"{kind}, which is what llama.cpp does"
            )
    for option in ("clean_text", "handle_chinese_chars"):
        if not normalizer.get(option, True):
            raise VocabularyError(f"{name}: {option} is off, which llama.cpp always does")
    lowercase = bool(normalizer.get("lowercase", True))
    strip = normalizer.get("strip_accents")
    return lowercase, lowercase if strip is None else bool(strip)
