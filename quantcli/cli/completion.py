"""Completion of commands, options and values in bash, zsh and fish, without loading the program.

The scripts that `--install-completion` installs call quantcli at each press of the key. Loading all
commands for that takes a third of a second, so the answer comes from a table, completions.json,
which `scripts/make-reference` writes; the protocol is typer's. What stands in no table (a file) is
left to the shell.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "_QUANTCLI_COMPLETE"
_SHELLS = ("complete_bash", "complete_zsh", "complete_fish")


def answers_completion() -> bool:
    """Answer a shell that asks; False where none does, or one that typer has to answer."""
    shell = os.environ.get(VARIABLE)
    if shell not in _SHELLS:
        return False
    words, current = _typed(shell)
    table = json.loads(Path(__file__).with_name("completions.json").read_text(encoding="utf-8"))
    _answer(shell, find_completions(table, words, current))
    return True


def find_completions(
    table: Mapping[str, Any], words: Sequence[str], current: str
) -> list[tuple[str, str]]:
    """What ``current`` may become after ``words``, each with its help; empty for a file's name."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command is None or command not in table["commands"]:
        found = {**table["commands"], **table["options"]} if command is None else {}
        return [(name, _help(each)) for name, each in found.items() if name.startswith(current)]
    options = table["commands"][command]["options"]
    last = words[-1] if words else ""
    if last == "=" and len(words) > 1:  # bash splits --type=Q4 into three words
        last = words[-2]
    flag, equals, value = current.partition("=")
    if equals and flag in options and current.startswith("--"):
        values = options[flag]["values"]
        return [(f"{flag}={each}", "") for each in _complete_list(values, value)]
    if last in options and options[last]["takes"]:
        typed = "" if current == "=" else current
        return [(each, "") for each in _complete_list(options[last]["values"], typed)]
    if not current.startswith("-"):
        return []
    return [(name, _help(each)) for name, each in options.items() if name.startswith(current)]


def _complete_list(values: Sequence[str], typed: str) -> list[str]:
    """Values that begin as typed, in any case; after a comma the next of a list."""
    before, comma, last = typed.rpartition(",")
    given = before.split(",") if comma else []
    fit = [each for each in values if each.lower().startswith(last.lower()) and each not in given]
    return [before + comma + each for each in fit]


def _help(found: Mapping[str, Any]) -> str:
    text: str = found["help"]
    return text


def _typed(shell: str) -> tuple[list[str], str]:
    """The words before the one that is completed, without the program's name, and that one."""
    if shell == "complete_bash":
        # typer's script joins them with newlines, the first character of its IFS.
        words = os.environ.get("COMP_WORDS", "").replace("\n", " ").split(" ")
        place = int(os.environ.get("COMP_CWORD", "0"))
        return words[1:place], words[place] if place < len(words) else ""
    words = os.environ.get("_TYPER_COMPLETE_ARGS", "").split(" ")
    return [word for word in words[1:-1] if word], words[-1] if len(words) > 1 else ""


def _answer(shell: str, found: Sequence[tuple[str, str]]) -> None:
    lines = [name for name, _ in found]
    if shell == "complete_zsh":
        shown = [f'"{_quote(name)}":"{_quote(text)}"' if text else f'"{_quote(name)}"'
                 for name, text in found]  # fmt: skip
        listed = "\n".join(shown)
        lines = [f"_arguments '*: :(({listed}))'" if found else "_files"]
    elif shell == "complete_fish":
        if os.environ.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
            sys.exit(0 if found else 1)
        lines = [f"{name}\t{text}" if text else name for name, text in found]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _quote(text: str) -> str:
    """Text inside of double quotes inside of single quotes of an `eval` in zsh."""
    for plain, quoted in (('"', '""'), ("'", "''"), ("$", "\\$"), ("`", "\\`"), (":", r"\\:")):
        text = text.replace(plain, quoted)
    return text
