"""llama.cpp's pre-tokenizers, and the structures of ``tokenizer.json`` that each of them splits as.

GGUF names a pre-tokenizer (``tokenizer.ggml.pre``) and llama.cpp holds the regexes behind the
name (src/llama-vocab.cpp). llama.cpp's converter finds the name by hashing the ids of a fixed text
and so knows only vocabularies that it has seen; here the name follows from how text is split, so
a newly trained or extended vocabulary is as good as a published one. Structures are those of the
models that the names belong to; names that llama.cpp splits alike share a line, the best known
first.

A split is not everything: with ``ignore_merges`` a word that is in the vocabulary is taken whole,
without its merges. llama.cpp ties that to the name too, so a line is only taken for a tokenizer
with the other setting when the caller has shown that both give the same tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from quantcli.errors import UsageError, VocabularyError
from quantcli.registry import near
from quantcli.vocab import regexes as r
from quantcli.vocab.pretokenizer_steps import BYTES, split


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A name, the steps that it stands for, and names that llama.cpp treats alike."""

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    also: tuple[str, ...] = ()


def _line(
    name: str, *parts: str, ignore_merges: bool = False, also: tuple[str, ...] = ()
) -> PreTokenizer:
    steps = tuple(part if part.startswith("split ") or part == BYTES else split(part)
                  for part in parts)  # fmt: skip
    return PreTokenizer(name, steps if BYTES in steps else (*steps, BYTES), ignore_merges, also)


TABLE = (
    _line("gpt-2", r.GPT2, also=(
        "mpt", "olmo", "jais", "trillion", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4",
        "granite-docling", "modern-bert", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de",
    )),
    _line("llama-bpe", r.LLAMA3, ignore_merges=True, also=(
        "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
        "jina-v5-nano", "glm4", "glm5",
    )),
    _line("dbrx", r.LLAMA3, also=("smaug-bpe", "chatglm-bpe")),
    _line("qwen2", r.QWEN2, also=(
        "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open", "grok-2", "bailingmoe",
        "bailingmoe2", "llada-moe", "kormo", "f2llmv2",
    )),
    _line("qwen35", r.QWEN35),
    _line("tekken", r.TEKKEN, ignore_merges=True),
    _line("gpt-4o", r.O200K, also=("llama4", "kanana2", "talkie", "minimax-m2")),
    _line("smollm", r.DIGIT, r.GPT2, also=(
        "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    )),
    _line("deepseek-v3", r.THREE_DIGITS, r.CJK_AND_KANA, r.DEEPSEEK3_WORDS, also=(
        "hunyuan-dense", "joyai-llm", "hy_v4",
    )),
    _line("deepseek-llm", r.LINE_BREAK, r.DEEPSEEK_LETTERS, r.DEEPSEEK_SIGNS, r.DEEPSEEK_SPACES,
          r.CJK, r.DIGIT),
    _line("deepseek-coder", r.LINE_BREAK, r.DEEPSEEK_CODER_LETTERS, r.DEEPSEEK_CODER_SIGNS, r.CJK,
          r.DIGIT),
    _line("falcon", r.PUNCTUATION_RUNS, r.GPT2, BYTES, r.DIGITS, r.ASCII_TRIPLE),
    _line("bloom", r.BLOOM, also=("poro-chat", "gpt3-finnish")),
    _line("viking", r.BLOOM, r.DIGIT),
    _line("seed-coder", r.SEED_CODER),
    _line("exaone-moe", r.EXAONE_MOE),
    _line("jais-2", r.JAIS2),
    _line("minicpm5", r.THREE_DIGITS, r.LLAMA3_ANY_DIGITS, ignore_merges=True),
    _line("tiny_aya", r.DIGITS_FROM_THE_RIGHT, r.O200K, also=("cohere2moe",)),
    _line("laguna", split(r.LINE_BREAK_RUNS, "mergedwithnext"), r.QWEN2),
    _line("spark2_5", r.THREE_DIGITS, r.CJK_AND_KANA, r.SPARK_WORDS, r.DIGIT),
    _line("youtu", r.YOUTU_SCRIPTS, r.O200K_ONE_DIGIT, ignore_merges=True),
    _line("kimi-k2", r.KIMI),
    _line("ufakzeka", r.UFAKZEKA),
    _line("superbpe", r.DIGITS, r.GROUPS_OF_THREE),
)  # fmt: skip
"""One line for each way in which llama.cpp splits text, most common first."""

WITHOUT_STRUCTURE = (
    "default", "afmoe", "chameleon", "granite-embed-multi-97m", "roberta-bpe",
    "jina-v1-en", "jina-v2-code",
)  # fmt: skip
"""Names that llama.cpp knows and that are only taken when they are asked for."""

NAMES = (*(name for line in TABLE for name in (line.name, *line.also)), *WITHOUT_STRUCTURE)
"""Every name that may be given for a byte-level tokenizer."""


def check_name(name: str) -> str:
    """``name`` if llama.cpp knows it; UsageError with near names and the list otherwise."""
    if name in NAMES:
        return name
    guesses = near(name, NAMES)
    known = "known: " + ", ".join(NAMES)
    raise UsageError(
        f"there is no pre-tokenizer named {name!r}",
        hint=f"did you mean {' or '.join(guesses)}? {known}" if guesses else known,
    )


def recognise(
    steps: tuple[str, ...],
    *,
    ignore_merges: bool,
    merges_make_every_token: Callable[[], bool],
    file: str,
) -> str:
    """The name of the pre-tokenizer that splits as ``steps`` do.

    ``merges_make_every_token`` is asked only where no line has the tokenizer's ``ignore_merges``;
    ``file`` is named in the VocabularyError for an unknown structure.
    """
    alike = [line for line in TABLE if line.steps == steps]
    if not alike:
        raise _unknown(steps, file)
    exact = [line for line in alike if line.ignore_merges == ignore_merges]
    if exact:
        return exact[0].name
    if merges_make_every_token():
        return alike[0].name
    raise VocabularyError(
        f"{file}: ignore_merges is {str(ignore_merges).lower()}, llama.cpp's pre-tokenizer "
        f"{alike[0].name!r} has the opposite, and some tokens are not made by their merges, so "
        f"text would be tokenized differently",
        hint=f"--pre {alike[0].name} takes it all the same",
    )


def _unknown(steps: tuple[str, ...], file: str) -> VocabularyError:
    def likeness(line: PreTokenizer) -> tuple[float, float]:
        shared = len(set(line.steps) & set(steps)) / max(1, len(line.steps) + len(steps))
        text = difflib.SequenceMatcher(None, "\n".join(line.steps), "\n".join(steps))
        return shared, text.ratio()

    closest = max(TABLE, key=likeness)
    found = "; ".join(
        f"{where}: {', '.join(map(_shorten, only))}"
        for where, only in (
            ("only here", [step for step in steps if step not in closest.steps]),
            ("only there", [step for step in closest.steps if step not in steps]),
        )
        if only
    )
    return VocabularyError(
        f"{file}: llama.cpp has no pre-tokenizer of this structure; the closest is "
        f"{closest.name!r} ({found or 'with its steps in another order'})",
        hint=f"--pre {closest.name} takes it all the same; compare the ids of some text first",
    )


def _shorten(step: str, most: int = 72) -> str:
    return step if len(step) <= most else step[: most - 1] + "…"
