"""Help in two tiers: `--help` shows what most people use, `--help-all` every option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

ALL = "--help-all"
_SWITCHES = ("threads", "json", "quiet", "verbose", "debug", "help")
ESSENTIAL: Mapping[str, tuple[str, ...]] = {
    "quantize": (
        "bits", "type", "output_set", "fit", "to", "scheme", "imatrix", "method", "quality",
        "calibrate", "allocate", "target_size", "keep", "recipe", "resume", "output", "mmproj",
        "force", "dry_run", "prompt", "push", "report",
    ),
    "calibrate": (
        "data", "chunks", "ctx", "collect", "stats", "merge", "output", "resume", "force",
    ),
    "eval-ppl": (
        "data", "ctx", "chunks", "reference", "base", "save_base", "engine", "max_ppl", "max_kld",
        "min_top1", "plot", "report", "speed", "tasks",
    ),
}  # fmt: skip
"""The options of the first tier, by command; a command that is not here shows all of its own."""


@contextmanager
def essentials(command: Any) -> Iterator[int]:
    """Hide a click command's other options, and second names, for a while.

    Gives the number of the options.
    """
    shown = ESSENTIAL.get(command.name)
    others = [
        each for each in command.params
        if shown is not None and each.param_type_name == "option" and not each.hidden
        and each.name not in (*shown, *_SWITCHES)
    ]  # fmt: skip
    names = [(each, each.opts) for each in command.params if each.param_type_name == "option"]
    for each in others:
        each.hidden = True
    for each, found in names:
        each.opts = [*_of_kind(found, is_long=True)[:1], *_of_kind(found, is_long=False)]
    try:
        yield len(others)
    finally:
        for each, found in names:
            each.opts = found
        for each in others:
            each.hidden = False


def _of_kind(flags: list[str], *, is_long: bool) -> list[str]:
    return [flag for flag in flags if flag.startswith("--") is is_long]
