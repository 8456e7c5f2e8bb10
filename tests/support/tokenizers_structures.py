"""tokenizer.json's pre-tokenizers as published, by llama.cpp's name, and where llama.cpp differs.

A structure is written as the model's own file has it. `DIFFERS` names snippets of the page that
llama.cpp splits otherwise, with the reason; the tests leave exactly these out, and see to it that
each of them is still needed.
"""

from __future__ import annotations

from typing import Any

from support.tokenizers_build import byte_level, digits, sequence, split

from quantcli.vocab import regexes as r

_BYTES = byte_level()
_GPT2_BYTES = byte_level(use_regex=True)


def _splits(*patterns: str) -> dict[str, Any]:
    return sequence(*map(split, patterns), _BYTES)


STRUCTURES: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2_BYTES,
    "llama-bpe": _splits(r.LLAMA3),
    "dbrx": sequence(split(r.LLAMA3, "Removed", invert=True), _BYTES),
    "qwen2": _splits(r.QWEN2),
    "qwen35": _splits(r.QWEN35),
    "tekken": _splits(r.TEKKEN),
    "gpt-4o": _splits(r.O200K),
    "smollm": sequence(digits(), _GPT2_BYTES),
    "deepseek-v3": _splits(r.THREE_DIGITS, r.CJK_AND_KANA, r.DEEPSEEK3_WORDS.replace(r"\r", "\r")),
    "deepseek-llm": sequence(
        split("[\r\n]"),
        split(r.DEEPSEEK_LETTERS),
        split(r.DEEPSEEK_SIGNS),
        split(r.DEEPSEEK_SPACES),
        split(r.CJK),
        digits(),
        _BYTES,
    ),
    "deepseek-coder": sequence(
        split("[\r\n]"),
        split(r.DEEPSEEK_CODER_LETTERS),
        split(r.DEEPSEEK_CODER_SIGNS),
        split(r.CJK),
        digits(),
        _BYTES,
    ),
    "falcon": sequence(
        {"type": "Punctuation", "behavior": "Contiguous"},
        _GPT2_BYTES,
        digits(individual=False),
        split(r.ASCII_TRIPLE),
    ),
    "bloom": _splits(r.BLOOM),
    "viking": sequence(split(r.BLOOM), digits(), _BYTES),
    "seed-coder": _splits(r.SEED_CODER.replace(r"|\p{N}|", r"|\p{N}{1}|")),
    "exaone-moe": _splits(r.EXAONE_MOE.replace(r"|\s*[\r\n]+|", r"|\s*[\r\n]|")),
    "jais-2": _splits(r.JAIS2),
    "minicpm5": _splits(r.THREE_DIGITS, r.LLAMA3_ANY_DIGITS),
    "tiny_aya": _splits(r.DIGITS_FROM_THE_RIGHT, r.O200K),
    "laguna": sequence(split(r.LINE_BREAK_RUNS, "MergedWithNext"), split(r.QWEN2), _BYTES),
    "spark2_5": sequence(
        split(r.THREE_DIGITS), split(r.CJK_AND_KANA), split(r.SPARK_WORDS), digits(), _BYTES
    ),
    "youtu": _splits(r.YOUTU_SCRIPTS, r.O200K_ONE_DIGIT),
    "kimi-k2": _splits(r.KIMI),
    "ufakzeka": _splits(r.UFAKZEKA),
    "superbpe": _splits(r.DIGITS, r.GROUPS_OF_THREE),
}

IGNORE_MERGES = frozenset({"llama-bpe", "tekken", "minicpm5", "youtu"})
"""Those whose models have ``ignore_merges``."""

_CAPITALS = (
    "std::regex has no case of letters beyond ASCII: llama.cpp writes a small letter as 'any "
    "letter but A-Z' and a capital as 'any letter but a-z', so it does not see a capital there"
)
_MARKS = "llama.cpp's pattern counts only letters, not combining marks, as parts of a word"
_LONG_S = "'s without regard to case is also the long s in Oniguruma, but only s and S in llama.cpp"

DIFFERS: dict[str, dict[str, str]] = {
    "tekken": {
        "capital after small": _CAPITALS,
        "hindi": _MARKS,
        "thai": _MARKS,
        "combining": _MARKS,
    },
    "gpt-4o": {
        "capital after small": _CAPITALS,
        "hindi": _MARKS,
        "thai": _MARKS,
        "combining": _MARKS,
        "long s": _LONG_S,
    },
    "kimi-k2": {
        "capital after small": "its hand-written splitter does not look at case",
        "hindi": _MARKS,
        "thai": _MARKS,
        "combining": _MARKS,
        "long s": _LONG_S,
    },
    "youtu": {"capital after small": _CAPITALS, "long s": _LONG_S},
    "tiny_aya": {
        "capital after small": _CAPITALS,
        "long s": _LONG_S,
        "spaces before digits": "its hand-written splitter leaves what stands before digits with "
        "them, so that spaces there are no longer at the end of a piece",
        "chinese": "its hand-written splitter groups digits without looking for the word boundary "
        "that the regex wants after them, and there is none before a CJK character",
    },
    "superbpe": {
        "digits of other scripts": r"\d is any digit in Oniguruma and 0 to 9 in std::regex"
    },
    "laguna": {
        "carriage return": "llama.cpp splits at runs of line feeds and leaves the carriage return "
        "with the text before"
    },
}
