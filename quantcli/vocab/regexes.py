r"""The word-splitting regexes of published tokenizers, and which spellings of one mean the same.

A regex is compared with the table as text, after `canonical` has removed differences of spelling
that cannot change a match. Each is written as its ``tokenizer.json`` has it, in the syntax of
Oniguruma; llama.cpp has its own form of it beside the pre-tokenizer's name (src/llama-vocab.cpp,
``llm_tokenizer_bpe``), which differs in corners that the tests of this package name.
"""

from __future__ import annotations

import re

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def _cased_words(after: str, upper: str = _UPPER, lower: str = _LOWER) -> str:
    """Words that end where a capital follows a small letter, as OpenAI's o200k splits them."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{upper}*{lower}+{after}|{lead}{upper}+{lower}*{after}"


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"
LLAMA3_ANY_DIGITS = rf"{_CONTRACTION}|{_WORD}|\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"
QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"
QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_TAIL}"
)
UFAKZEKA = rf"{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"
SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_TAIL}"
EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?{_TAIL}"
)
JAIS2 = (
    rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    + "".join(rf"|\s{{{run}}}(?!\S)" for run in ("512", "256", "128", "64", "32", "16", "8", "4"))
    + r"|\s{1,2}(?!\S)|\s{1}"
)
O200K = _cased_words(_CONTRACTION + "?") + (
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"
)
O200K_ONE_DIGIT = _cased_words(_CONTRACTION + "?") + (
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"
)
TEKKEN = _cased_words("") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"
KIMI = (
    r"[\p{Han}]+|"
    + _cased_words(
        _CONTRACTION + "?",
        _UPPER[:-1] + r"&&[^\p{Han}]]",
        _LOWER[:-1] + r"&&[^\p{Han}]]",
    )
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DIGIT = r"\p{N}"
DIGITS = r"\p{N}+"
THREE_DIGITS = r"\p{N}{1,3}"
DIGITS_FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*\b)"
GROUPS_OF_THREE = r"(?=(\d{3})+(?!\d))"
ASCII_TRIPLE = "[0-9][0-9][0-9]"
PUNCTUATION_RUNS = r"[\p{P}$+<=>^`|~]+"
LINE_BREAK = r"[\r\n]"
LINE_BREAK_RUNS = r"(?:\r?\n)+(?!\r?\n)"
CJK = "[一-龥ࠀ-一가-퟿]+"
CJK_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK_LETTERS = (
    "\\s?["
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-"
    "ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭ"
    "ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
    "]+"
)
DEEPSEEK_SIGNS = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
DEEPSEEK_SPACES = r"\s+$"
DEEPSEEK_CODER_LETTERS = r"\s?\p{L}+"
DEEPSEEK_CODER_SIGNS = r"\s?\p{P}+"
DEEPSEEK3_WORDS = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_TAIL}"
)
SPARK_WORDS = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)

COVERING = frozenset(
    {
        GPT2, LLAMA3, LLAMA3_ANY_DIGITS, QWEN2, QWEN35, UFAKZEKA, SEED_CODER, EXAONE_MOE,
        O200K, O200K_ONE_DIGIT, TEKKEN, KIMI,
    }
)  # fmt: skip
"""Regexes that match every character somewhere, so that nothing lies between two matches."""

_POSSESSIVE = re.compile(r"(?<=[\]}])([?*+])\+")
"""A quantifier that gives nothing back; in the table no following part could take it anyway."""

_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTION),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTION),
    ("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"),
    (r"\p{N}{1}", r"\p{N}"),
    # ``\s*`` takes the whole run first and gives back one line break, so one is as good as many.
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
)


def canonical(regex: str) -> str:
    """``regex`` with the spellings that match the same text brought to the table's."""
    regex = _POSSESSIVE.sub(r"\1", regex)
    for spelling, plain in _SPELLINGS:
        regex = regex.replace(spelling, plain)
    return regex
