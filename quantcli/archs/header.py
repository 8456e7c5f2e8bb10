"""From a GGUF's key-values back to a config.json that transformers understands.

`Architecture.to_keys` turns a configuration into key-values; `Architecture.to_config` is the way
back, and the result is checked by going forth again: every key-value must come out as it stands in
the file, so a model that the table does not describe is refused rather than computed otherwise.
What GGUF does not say is what llama.cpp takes for granted (`Architecture.fixed`).

Numbers are stored in float32 and come back as the shortest decimal that rounds to them, which is
what a publisher wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.mtp import drop_blocks
from quantcli.types import MetaValue

Read = Callable[[str], NDArray[np.float32]]
"""Gives the values of a small tensor, by its GGUF name."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF says about its model: key-values without the architecture's prefix, shapes."""

    keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Read
    behind: Mapping[str, list[Any]] = field(default_factory=dict)
    """Of lists with an entry for every block, those for multi-token prediction."""

    def named(self, **table: str) -> dict[str, Any]:
        """The configuration's keys for which the file has the key-value that ``table`` names."""
        return {ours: self.keys[key] for ours, key in table.items() if key in self.keys}


def read_header(
    arch: str,
    metadata: Mapping[str, MetaValue],
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
) -> Header:
    """The key-values of ``arch``; float32 values as the shortest decimals that round to them.

    They are the layers' alone: without blocks for multi-token prediction.
    """
    prefix = f"{arch}."
    layers = drop_blocks(arch, metadata)
    keys = {k.removeprefix(prefix): _plain(v) for k, v in layers.items() if k.startswith(prefix)}
    behind = {
        key.removeprefix(prefix): metadata[key].value[len(value.value) :]
        for key, value in layers.items()
        if value.kind.startswith("[") and len(metadata[key].value) > len(value.value)
    }
    return Header(keys, shapes, read, behind)


def same_value(found: Any, expected: Any) -> bool:
    """Whether two key-values are equal, in float32 where one is a float."""
    if isinstance(expected, float):
        return isinstance(found, int | float) and np.float32(found) == np.float32(expected)
    return bool(found == expected)


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32."""
    return float(str(np.float32(value)))


def _plain(value: MetaValue) -> Any:
    return shortest(value.value) if value.kind == "f32" else value.value
