"""``tokenizer.*`` key-values of a GGUF -> the tokenizer files that transformers loads.

The way back of this package, with the same rule: the ids that the files give for a text are those
that llama.cpp gives for the GGUF. Byte-level BPE is determined by its tokens, its merges and the
name of its pre-tokenizer, a SentencePiece model by its pieces and their scores.

What GGUF does not keep cannot come back, and is noted where it may matter: Unicode normalization
before byte-level BPE (llama.cpp does not normalize), and whether an added token takes the spaces
beside it. Refused: a GGUF without a tokenizer, a kind of tokenizer without a rebuilt form, and a
pre-tokenizer that is only known by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue
from quantcli.vocab.gguf_vocabulary import HINT, GgufVocabulary, read_gguf_vocabulary
from quantcli.vocab.rebuild_bytes import byte_level_parts, escaped_parts
from quantcli.vocab.rebuild_pieces import piece_parts
from quantcli.vocab.rebuild_unigram import unigram_parts
from quantcli.vocab.rebuild_words import word_parts, word_token
from quantcli.vocab.special import ADD_BOS, KEYS
from quantcli.vocab.tokens import TokenType

_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Rebuilt:
    """Tokenizer files by name: JSON objects, and chat templates as text."""

    objects: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Builder = Callable[[GgufVocabulary], tuple[dict[str, Any], list[str]]]

_MODELS: Mapping[str, Builder] = {
    "bert": word_parts,
    "gemma4": escaped_parts,
    "gpt2": byte_level_parts,
    "llama": piece_parts,
    "t5": unigram_parts,
}
"""By ``tokenizer.ggml.model``."""


def rebuild_tokenizer(
    metadata: Mapping[str, MetaValue], file: str, *, context: int | None = None
) -> Rebuilt:
    """The tokenizer files that ``metadata`` determines; ``file`` is the GGUF's name for messages.

    ``context`` is the longest text in tokens. VocabularyError says why there are none.
    """
    vocab = read_gguf_vocabulary(metadata, file)
    kind = str(vocab.keys.get("model"))
    if kind not in _MODELS:
        raise VocabularyError(
            f"{file}: a tokenizer of the kind {kind!r} cannot be rebuilt; "
            f"{' and '.join(map(repr, _MODELS))} can",
            hint=HINT,
        )
    parts, notes = _MODELS[kind](vocab)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(vocab),
        **parts,
        "post_processor": _template(vocab, kind),
    }
    templates = read_templates(metadata)
    settings = _settings(vocab, kind, context)
    if set(templates) - {"default"}:
        settings["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
        templates = {}
    texts = {"chat_template.jinja": templates["default"]} if templates else {}
    objects = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    return Rebuilt(objects, texts, tuple(notes))


def read_templates(metadata: Mapping[str, MetaValue]) -> dict[str, str]:
    """Chat templates by name; the one that is taken without a name is "default"."""
    found = {}
    for key, value in metadata.items():
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            found[key.removeprefix(_TEMPLATE).removeprefix(".") or "default"] = str(value.value)
    return found


def _added(vocab: GgufVocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in the text before the model runs; control tokens are special."""
    special = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    return [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special[TokenType(kind)],
        }
        for number, (text, kind) in enumerate(zip(vocab.tokens, vocab.kinds, strict=True))
        if kind in special
    ]


def _template(vocab: GgufVocabulary, kind: str) -> dict[str, Any] | None:
    """The post-processor that adds BOS and EOS where llama.cpp does."""
    # To Gemma 4's kind llama.cpp adds BOS whatever the key says.
    added = kind == "gemma4" or vocab.keys.get("add_bos_token", kind in ADD_BOS)
    bos = vocab.token("bos") if added else None
    eos = vocab.token("eos") if vocab.keys.get("add_eos_token", False) else None
    if kind == "bert":
        bos, eos = word_token(vocab, "bos"), word_token(vocab, "sep")
    around = [token for token in (bos, eos) if token is not None]
    if not around:
        # transformers takes this for a sign that nothing is added.
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                "use_regex": True} if kind == "gpt2" else None  # fmt: skip

    def body(number: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": "AB"[number], "type_id": number}}
        begins = bos is not None and (number == 0 or kind != "bert")
        before = [{"SpecialToken": {"id": bos, "type_id": number}}] if begins else []
        after = [{"SpecialToken": {"id": eos, "type_id": number}}] if eos else []
        return [*before, text, *after]

    numbers = {text: number for number, text in enumerate(vocab.tokens)}
    return {
        "type": "TemplateProcessing",
        "single": body(0),
        "pair": [*body(0), *body(1)],
        "special_tokens": {
            token: {"id": token, "ids": [numbers[token]], "tokens": [token]} for token in around
        },
    }


def _settings(vocab: GgufVocabulary, kind: str, context: int | None) -> dict[str, Any]:
    """tokenizer_config.json; its class is the one that runs tokenizer.json as it stands."""
    named = {f"{role}_token": vocab.token(role) for role in KEYS}
    if kind == "bert":
        named |= {"cls_token": word_token(vocab, "bos"), "sep_token": word_token(vocab, "sep")}
    return {
        "clean_up_tokenization_spaces": False,
        **{key: value for key, value in named.items() if value is not None},
        **({} if context is None else {"model_max_length": context}),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
