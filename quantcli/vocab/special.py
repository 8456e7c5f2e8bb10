"""The ids that mean something to the runtime: BOS, EOS, end of turn, fill-in-the-middle ...

A role's token is what, in this order, the template of ``tokenizer.json`` puts around a text, then
tokenizer_config.json, special_tokens_map.json, config.json, generation_config.json and the
SentencePiece model name; the order of gguf's ``SpecialVocab``, with the sources that it leaves out
at the end. Ends of turn and fill-in-the-middle tokens are known by their text only. llama.cpp
finds them by the same texts, but takes any where a vocabulary has several; written here, the
first of the table is taken.

Whether BOS and EOS are added is always written for a ``tokenizer.json``, because the runtime's
default belongs to the pre-tokenizer's name and not to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue, boolean, u32
from quantcli.vocab.files import TokenizerFiles
from quantcli.vocab.post_processor import Surround, read_surround

_PREFIX = "tokenizer.ggml."

ADD_BOS = frozenset({"llama", "gemma4"})
"""Kinds of tokenizers to which llama.cpp adds BOS where no key says whether."""

KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
"""GGUF's key (with its spelling of "separator") for each role of tokenizer_config.json."""

BY_TEXT = {
    "eot_token_id": (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>",
        "▁<EOT>", "_<EOT>", "[EOT]", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>",
    ),
    "eom_token_id": ("<|eom_id|>",),
    "fim_pre_token_id": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
        "<|code_prefix|>", "<|prefix|>",
    ),
    "fim_suf_token_id": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
        "<|code_suffix|>", "<|suffix|>",
    ),
    "fim_mid_token_id": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
        "<|code_middle|>", "<|middle|>",
    ),
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": (
        "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    ),
    "fim_sep_token_id": ("<|file_sep|>",),
}  # fmt: skip
"""Roles that llama.cpp gives to tokens with these texts (src/llama-vocab.cpp)."""

_ENDING_TEXTS = frozenset(
    (*BY_TEXT["eot_token_id"], *BY_TEXT["eom_token_id"], "<|return|>", "<|call|>", "<|flush|>",
     "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~[")
)  # fmt: skip
"""Texts that end generation in llama.cpp without being named by a key."""


def special_key_values(
    files: TokenizerFiles,
    ids: Mapping[str, int],
    size: int,
    *,
    defaults: Mapping[str, int] | None = None,
) -> dict[str, MetaValue]:
    """Every ``*_token_id`` and ``add_*_token`` key-value.

    ``ids`` gives the id of each token's text as the files spell it; ``defaults`` are the
    SentencePiece model's own ids by role.
    """
    names = {role: _named_token(files, role) for role in (*KEYS, "cls")}
    around = read_surround(
        files.tokenizer.post_processor if files.tokenizer else None, (names["sep"], names["eos"])
    )
    for text in (around.first, around.last):
        if text is not None and text not in ids:
            raise VocabularyError(
                f"{files.path('tokenizer.json')}: the post_processor adds {text!r}, which is not "
                "in the vocabulary"
            )
    found: dict[str, int] = {}
    chosen = {**names, "bos": around.first or names["bos"] or names["cls"],
              "eos": around.last or names["eos"] or names["sep"]}  # fmt: skip
    if around.sep and chosen["sep"] is None:
        chosen["sep"] = chosen["eos"]
    for role in KEYS:
        number = _resolve(files, role, chosen[role], ids, size, (defaults or {}).get(role))
        if number is not None:
            found[KEYS[role]] = number
    named_eos = ids.get(names["eos"]) if names["eos"] is not None else None
    found |= _by_text(files, ids, size, found, named_eos)
    result = {_PREFIX + key: u32(number) for key, number in found.items()}
    return result | _additions(files, around, found)


def named_special_tokens(files: TokenizerFiles) -> set[str]:
    """Texts that tokenizer_config.json names as special, whether added tokens or not."""
    names = {_named_token(files, role) for role in (*KEYS, "cls")}
    return {name for name in names if name is not None}


def _named_token(files: TokenizerFiles, role: str) -> str | None:
    for source in (files.tokenizer_config, files.special_tokens_map):
        entry = source.get(f"{role}_token")
        if isinstance(entry, Mapping):
            entry = entry.get("content")
        if isinstance(entry, str) and entry:
            return entry
    return None


def _configured(files: TokenizerFiles, role: str) -> list[int]:
    """Ids of ``role`` in the configurations, in order; some hold lists, some -1 for none.

    VocabularyError for what is no whole number.
    """
    inner = (files.config.get(key) for key in ("text_config", "llm_config"))
    text_config = next((part for part in inner if isinstance(part, Mapping)), {})
    sources = (files.config, text_config, files.generation_config)
    found: list[int] = []
    for source in sources:
        value = source.get(f"{role}_token_id")
        for number in value if isinstance(value, list) else [value]:
            if number is not None and type(number) is not int:
                raise VocabularyError(
                    f"{files.folder}: {role}_token_id is {number!r}, expected a token's number",
                    hint="correct it in config.json or generation_config.json",
                )
            if number is not None and number >= 0 and number not in found:
                found.append(number)
    return found


def _resolve(
    files: TokenizerFiles,
    role: str,
    name: str | None,
    ids: Mapping[str, int],
    size: int,
    default: int | None,
) -> int | None:
    if name is not None and name in ids:
        return ids[name]
    candidates = _configured(files, role) or ([default] if default is not None else [])
    if not candidates:
        return None
    if candidates[0] < size:
        return candidates[0]
    if role in ("bos", "eos"):
        raise VocabularyError(
            f"{files.folder}: {role}_token_id is {candidates[0]}, outside the vocabulary of "
            f"{size} tokens"
        )
    return None


def _by_text(
    files: TokenizerFiles,
    ids: Mapping[str, int],
    size: int,
    found: Mapping[str, int],
    named_eos: int | None,
) -> dict[str, int]:
    result: dict[str, int] = {}
    for key, texts in BY_TEXT.items():
        number = next((ids[text] for text in texts if text in ids), None)
        if number is not None:
            result[key] = number
    eos = found.get("eos_token_id")
    endings = {number for text, number in ids.items() if text in _ENDING_TEXTS}
    more = [named_eos, *_configured(files, "eos")]
    for number in more:
        # Further ends of generation that the runtime would not know by their text.
        if number is None or number == eos or number in endings or number >= size:
            continue
        free = next((key for key in ("eot_token_id", "eom_token_id") if key not in result), None)
        if free is not None:
            result[free] = number
            endings.add(number)
    return result


def unknown_ends(
    files: TokenizerFiles, texts: Sequence[Any], keys: Mapping[str, MetaValue]
) -> list[int]:
    """Ids that end generation in the checkpoint, and that llama.cpp knows by no key and no text."""
    roles = ("eos_token_id", "eot_token_id", "eom_token_id")
    known = {keys[_PREFIX + role].value for role in roles if _PREFIX + role in keys}
    return [
        number
        for number in _configured(files, "eos")
        if number < len(texts) and number not in known and texts[number] not in _ENDING_TEXTS
    ]


def _additions(
    files: TokenizerFiles, around: Surround, found: Mapping[str, int]
) -> dict[str, MetaValue]:
    result: dict[str, MetaValue] = {}
    for role, decided in (("bos", around.bos), ("eos", around.eos), ("sep", around.sep)):
        if decided is None:
            entry = files.tokenizer_config.get(f"add_{role}_token")
            decided = entry if isinstance(entry, bool) else None
        if decided is None and files.tokenizer is not None and role != "sep":
            decided = False
        if decided is None:
            continue
        if decided and role != "sep" and KEYS[role] not in found:
            raise VocabularyError(
                f"{files.folder}: the tokenizer adds {role.upper()} to every text, but no file "
                f"says which token that is",
                hint=f"name {role}_token in tokenizer_config.json",
            )
        result[f"{_PREFIX}add_{role}_token"] = boolean(decided)
    return result
