"""The kinds of input by name."""

from __future__ import annotations

from support.fuzz.case import Kind
from support.fuzz.kinds import checkpoints, gguf, importance, recipes, templates, tokenizers

KINDS: dict[str, Kind] = {
    kind.name: kind
    for module in (checkpoints, gguf, importance, recipes, templates, tokenizers)
    for kind in module.KINDS
}
