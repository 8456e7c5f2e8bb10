"""A model's key-values by their names without the architecture, one number for every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantcli.archs.base import LIMITS
from quantcli.errors import PlanError
from quantcli.plan.names import block_index
from quantcli.types import MetaValue, OutputTensor


@dataclass(frozen=True)
class Keys:
    """Key-values of one architecture, and the parts of tensors' names in each block.

    ``layers`` are the blocks that a token passes through: without those for multi-token prediction,
    which llama.cpp loads only to draft tokens.
    """

    arch: str
    layers: int
    metadata: Mapping[str, MetaValue]
    parts: Sequence[frozenset[str]]

    def number(self, key: str, default: int = 0) -> int:
        """A whole number; the largest of a list."""
        found = self.metadata.get(f"{self.arch}.{key}")
        if found is None:
            return default
        return max(_whole(f"{self.arch}.{key}", found), default=default)

    def by_layer(self, key: str, default: int = 0) -> list[int]:
        """A whole number for each layer, the same for all where the file has one."""
        found = self.metadata.get(f"{self.arch}.{key}")
        if found is None or not found.kind.startswith("["):
            return [self.number(key, default)] * self.layers
        values = _whole(f"{self.arch}.{key}", found)[: self.layers]
        if len(values) < self.layers:
            raise PlanError(
                f"key-value {self.arch}.{key} has {len(values)} entries for {self.layers} layers"
            )
        return values

    def listed(self, key: str) -> list[int] | None:
        """The numbers of a list with one for each layer; None for a single number or none."""
        found = self.metadata.get(f"{self.arch}.{key}")
        return self.by_layer(key) if found is not None and found.kind.startswith("[") else None

    def has(self, layer: int, *prefixes: str) -> bool:
        """Whether a tensor of that block is called ``blk.N.PREFIX...``."""
        return any(part.startswith(prefixes) for part in self.parts[layer])


def read_keys(metadata: Mapping[str, MetaValue], tensors: Sequence[OutputTensor]) -> Keys:
    """The key-values of a text model; PlanError where it has no architecture or no blocks."""
    found = metadata.get("general.architecture")
    if found is None:
        raise PlanError("the model has no general.architecture, so its memory cannot be told")
    arch = str(found.value)
    blocks = metadata.get(f"{arch}.block_count")
    if blocks is None:
        raise PlanError(f"the model has no key-value {arch}.block_count, so nothing runs it")
    further = metadata.get(f"{arch}.nextn_predict_layers")
    layers = max(_whole(f"{arch}.block_count", blocks), default=0)
    if further is not None:
        layers -= max(_whole(f"{arch}.nextn_predict_layers", further), default=0)
    if not 0 < layers <= LIMITS["layers"]:
        raise PlanError(
            f"key-value {arch}.block_count makes {layers} layers, and llama.cpp takes 1 to "
            f"{LIMITS['layers']}"
        )
    parts: list[set[str]] = [set() for _ in range(layers)]
    for tensor in tensors:
        layer = block_index(tensor.name)
        if layer is not None and layer < layers:
            parts[layer].add(tensor.name.split(".", 2)[2])
    return Keys(arch, layers, metadata, [frozenset(each) for each in parts])


def _whole(key: str, found: MetaValue) -> list[int]:
    """The number or numbers of a key-value; PlanError where they are no whole ones from 0 on."""
    values = list(found.value) if found.kind.startswith("[") else [found.value]
    if not all(isinstance(value, int | float) and 0 <= value < 2**40 for value in values):
        raise PlanError(f"key-value {key} should be a whole number, found {found.value!r:.80}")
    return [int(value) for value in values]
