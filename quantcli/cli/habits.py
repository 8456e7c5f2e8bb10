"""What people type who come from other tools: understood, or answered with the right option.

``llama-quantize IN OUT TYPE [THREADS]`` names output and type as arguments; convert_hf_to_gguf.py
has ``--outtype`` and ``--outfile``, mlx_lm.convert ``--q-bits``, llama-perplexity ``--file`` and
``--ctx-size``; and many expect a type to be an option of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantcli.errors import UsageError

_SPELLINGS = {
    "--outtype": "--type", "--outfile": "--output", "--q-bits": "--bits",
    "--q-group-size": "--group-size", "--calibration": "--calibrate",
    "--calibration-data": "--calibrate", "--dataset": "--calibrate",
}  # fmt: skip
_SPELLINGS_OF_TEXTS = {
    "--text": "--data", "--file": "--data", "--dataset": "--data", "--ctx-size": "--ctx",
    "--context": "--ctx", "--seq-len": "--ctx", "--kl-divergence-base": "--base",
}  # fmt: skip
_TYPE_OPTION = re.compile(r"--((?:i?q|tq|b?f|mxfp|nvfp)\d[\w-]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Words:
    """What stood behind the model."""

    output: str | None = None
    types: tuple[str, ...] = ()
    threads: int | None = None


def read_args(args: Sequence[str]) -> list[str]:
    """The arguments of ``quantize`` in our own spelling; UsageError for ``-t TYPE``."""
    found: list[str] = []
    for index, word in enumerate(args):
        if word == "--":
            return [*found, *args[index:]]
        before = args[index - 1] if index else ""
        if before in ("-t", "--threads") and not word.isdigit() and is_type(word):
            raise UsageError(
                f"{before} is the number of threads, and {word} is a type", hint=f"--type {word}"
            )
        flag, equals, value = word.partition("=")
        named = _TYPE_OPTION.fullmatch(word)
        if named and is_type(named[1].replace("-", "_")):
            found += ["--type", named[1].replace("-", "_")]
        else:
            found.append(_SPELLINGS.get(flag, flag) + equals + value)
    return found


def read_text_args(args: Sequence[str]) -> list[str]:
    """The arguments of ``eval-ppl`` and ``calibrate`` in our own spelling."""
    end = args.index("--") if "--" in args else len(args)
    split = [word.partition("=") for word in args[:end]]
    found = [_SPELLINGS_OF_TEXTS.get(flag, flag) + equals + value for flag, equals, value in split]
    return [*found, *args[end:]]


def read_words(model: str, words: Sequence[str]) -> Words:
    """What ``words`` behind the model say: an output, types, and after these a number of threads.

    UsageError, with the command that does it, for what is none of these.
    """
    if is_type(model) and not Path(model).exists():
        rest = " ".join(words) or "MODEL"
        raise UsageError(
            f"{model} is a type, and the model comes first",
            hint=f"quantcli quantize {rest} --type {model}",
        )
    output: str | None = None
    types: list[str] = []
    threads: int | None = None
    for word in words:
        if is_type(word):
            types.append(word)
        elif word.isdigit() and types and threads is None:
            threads = int(word)
        elif _is_output(word) and output is None:
            output = word
        else:
            _refuse(model, word)
    return Words(output, tuple(types), threads)


def is_type(word: str) -> bool:
    """Whether it names a type, or several with commas between them."""
    from quantcli.plan.filetypes import find_file_type

    try:
        for part in word.split(","):
            find_file_type(part)
    except UsageError:
        return False
    return True


def _is_output(word: str) -> bool:
    return word.endswith(".gguf") or "/" in word


def _refuse(model: str, word: str) -> None:
    """UsageError that says what ``word`` may have meant."""
    from quantcli.plan.filetypes import TYPE_OF_BITS, find_file_type
    from quantcli.plan.output_set import SETS

    message = f"{word} is neither an output (FILE.gguf or FOLDER/) nor a type"
    if word.lower() in SETS:
        hint: str | None = f"quantcli quantize {model} --set {word.lower()}"
    elif word.isdigit() and int(word) in TYPE_OF_BITS:
        hint = f"quantcli quantize {model} --bits {word}"
    elif word.upper() == "COPY":
        hint = f"quantcli export {model} --to gguf"
    elif _is_output(word):
        message, hint = f"there are two outputs, the second {word}", "name one folder for several"
    else:
        try:
            find_file_type(word)
        except UsageError as unknown:
            hint = unknown.hint
    raise UsageError(message, hint=hint)
