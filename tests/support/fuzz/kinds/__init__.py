"""The kinds of input by name."""

from __future__ import annotations

from support.fuzz.case import Kind
from support.fuzz.kinds import (
    cards,
    checkpoints,
    families,
    gguf,
    importance,
    options,
    packed,
    recipes,
    runs,
    templates,
    tokenizers,
)

_MODULES = (
    cards, checkpoints, families, gguf, importance, options, packed, recipes, runs, templates,
    tokenizers,
)  # fmt: skip
KINDS: dict[str, Kind] = {kind.name: kind for module in _MODULES for kind in module.KINDS}
