"""A model's key-values by their names without the architecture, one number for every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        values = found.value if found.kind.startswith("[") else [found.value]
        return max((int(value) for value in values), default=default)

    def by_layer(self, key: str, default: int = 0) -> list[int]:
        """A whole number for each layer, the same for all where the file has one."""
        found = self.metadata.get(f"{self.arch}.{key}")
        if found is None or not found.kind.startswith("["):
            return [self.number(key, default)] * self.layers
        values = [int(value) for value in found.value[: self.layers]]
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
    layers = int(blocks.value) - (int(further.value) if further is not None else 0)
    parts: list[set[str]] = [set() for _ in range(layers)]
    for tensor in tensors:
        layer = block_index(tensor.name)
        if layer is not None and layer < layers:
            parts[layer].add(tensor.name.split(".", 2)[2])
    return Keys(arch, layers, metadata, [frozenset(each) for each in parts])
