"""Layers that attend through a sliding window beside those that see the whole context.

GGUF has the window's size and one truth value a layer; config.json one of two words a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.header import Header
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, u32

WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_KINDS = {False: "full_attention", True: "sliding_attention"}


def layer_kinds(config: Config, layers: int, usual: Sequence[str]) -> list[str]:
    """``layer_types``, ``usual`` where there are none; refused unless one of two a layer."""
    found = config.get("layer_types")
    kinds = list(usual) if found is None else found
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {*_KINDS.values()}:
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json is {kinds!r}, expected one of "
            f"{' and '.join(_KINDS.values())} for each of {layers} layers"
        )
    return kinds


def window_keys(config: Config, kinds: Sequence[str]) -> dict[str, MetaValue]:
    """The window's size, and which layers have it; nothing where none has."""
    windowed = [kind == _KINDS[True] for kind in kinds]
    if not any(windowed):
        return {}
    return {
        WINDOW: u32(integer(config, "sliding_window")),
        PATTERN: array("bool", windowed),
    }


def window_config(header: Header) -> dict[str, Any]:
    """`window_keys` read backwards."""
    layers = int(header.keys.get("block_count", 0))
    pattern = header.keys.get(PATTERN, [False] * layers)
    kinds = [_KINDS[bool(windowed)] for windowed in pattern]
    return {**header.named(sliding_window=WINDOW), "layer_types": kinds}
