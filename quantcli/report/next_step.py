"""What to do with what a quantization made, in one line: a command to copy."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from quantcli.layouts import find_layout
from quantcli.plan.schemes import GGUF
from quantcli.run.outputs import Quantized


def next_step(
    outputs: Sequence[Quantized], which: Callable[[str], str | None] = shutil.which
) -> str:
    """A command that runs the output, in a runtime that is installed if one is.

    Of several files the one that compares them.
    """
    towers = [each for each in outputs if each.is_tower]
    made = [each for each in outputs if not each.is_tower] or towers
    first = made[0]
    path = first.artifact.paths[0]
    if first.artifact.plan.recipe.to != GGUF:
        folder = path if path.is_dir() or not path.suffix else path.parent
        return f"to run it: {find_layout(first.artifact.plan.recipe.to).usage(_quote(folder))}"
    if len(made) > 1:
        return f"to compare them: quantcli eval-ppl {_quote(path.parent)}/*.gguf --speed"
    if first.is_tower:
        return f"to use it: llama-mtmd-cli -m TEXT_MODEL.gguf --mmproj {_quote(path)}"
    if towers:
        tower = _quote(towers[0].artifact.paths[0])
        return f"to run it: llama-mtmd-cli -m {_quote(path)} --mmproj {tower}"
    if which("llama-cli") is None and len(first.artifact.paths) == 1:
        if which("ollama") is not None:
            return f"to run it in Ollama: quantcli export {_quote(path)} --to ollama"
        if which("lms") is not None:
            return f"to run it in LM Studio: lms import {_quote(path)}"
    return f"to run it: llama-cli -m {_quote(path)}"


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
