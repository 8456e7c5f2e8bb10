"""Blocks behind the last layer that predict further tokens: multi-token prediction, or NextN.

They are decoder blocks, each with a matrix that joins the last hidden state with the next token's
embedding. GGUF counts them in ``{arch}.block_count`` and says with ``{arch}.nextn_predict_layers``
how many of the blocks they are; llama.cpp leaves them alone unless it drafts tokens with them.
A checkpoint holds them or not whatever its config.json says, since transformers drops them when it
loads a model. So a block is part of a model if its tensors are there.

A family that has them declares an `Mtp`, and nothing more::

    Architecture(
        ...,
        mtp=Mtp(
            key="num_nextn_predict_layers",
            mark="model.layers.{i}.eh_proj.weight",
            read_rules=lambda config, blocks: behind(
                blocks, *NORMS, *ATTENTION, *EXPERTS, *nextn_rules(config)
            ),
        ),
    )

Its ``read_dims`` and ``read_rules`` go on counting the layers before them alone. ``to_keys`` finds
their number as ``dims["mtp"]``, which a list with an entry for every block needs; what it says of
``block_count`` is made up here. ``to_config`` sees key-values without them.

Sources: DeepSeek-V3 (arXiv:2412.19437), llama.cpp's llama-arch.cpp (LLM_TENSOR_NEXTN_*) and
conversion scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.rules import Rule, at
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

COUNT = "nextn_predict_layers"
"""GGUF's key of their number, without the architecture."""

_BLOCKS = "block_count"
_NOT_BY_BLOCK = ("rope.dimension_sections",)
"""Lists of key-values whose entries are not blocks, whatever their length."""


@dataclass(frozen=True, slots=True)
class Mtp:
    """What a family's blocks behind the last layer are made of."""

    key: str
    """config.json's key of their number; absent or null is none."""
    mark: str
    """A stored tensor of each block, by which it is told that it is there; ``{i}`` is the block's
    number, ``{k}`` counts from 0 behind the last layer."""
    read_rules: Callable[[Config, range], tuple[Rule, ...]]
    """Rules of these blocks' tensors, from the settled configuration."""
    most: int = 8
    """How many there may be; llama.cpp runs only one of some architectures."""

    def declared(self, config: Config) -> int:
        """How many config.json names; refuses more than ``most``."""
        if config.get(self.key) in (None, 0):
            return 0
        found = integer(config, self.key)
        if found > self.most:
            raise ArchitectureError(
                f"config.json of {class_name(config)} sets {self.key} to {found}, "
                f"but llama.cpp takes at most {self.most}"
            )
        return found

    def held(self, layers: int, names: Container[str]) -> int:
        """How many blocks are among stored ``names``, in the rules' spelling."""
        return next(
            k
            for k in range(self.most + 1)
            if k == self.most or at(self.mark, layers + k).replace("{k}", str(k)) not in names
        )

    def written(self, config: Config, layers: int, names: Container[str]) -> int:
        """How many blocks are among GGUF ``names``."""
        for count in range(self.most):
            rules = self.read_rules(config, range(layers + count, layers + count + 1))
            if not any(at(rule.name, layers + count) in names for rule in rules):
                return count
        return self.most


def behind(blocks: range, *rules: Rule) -> tuple[Rule, ...]:
    """The rules, which are those of a layer, for the blocks behind the last layer alone."""
    return tuple(replace(rule, layers=blocks) for rule in rules)


def nextn_rules(config: Config) -> tuple[Rule, ...]:
    """What DeepSeek-V3, GLM-4.5 and their kin have in such a block besides a decoder layer.

    Embeddings, head and its norm may be left out, for which the model's own are taken then.
    """
    hidden = integer(config, "hidden_size")
    parts = (
        ("eh_proj", "eh_proj.weight", (hidden, 2 * hidden), False),
        ("enorm", "enorm.weight", (hidden,), False),
        ("hnorm", "hnorm.weight", (hidden,), False),
        ("embed_tokens", "embed_tokens.weight", ("vocab", hidden), True),
        ("shared_head_head", "shared_head.head.weight", ("vocab", hidden), True),
        ("shared_head_norm", "shared_head.norm.weight", (hidden,), True),
    )
    return tuple(
        Rule(f"blk.{{i}}.nextn.{name}.weight", f"model.layers.{{i}}.{source}", shape,
             optional=optional)
        for name, source, shape, optional in parts
    )  # fmt: skip


def count_blocks(arch: str, keys: Mapping[str, MetaValue]) -> range:
    """The numbers of the blocks behind the last layer in a model with these key-values.

    None where the two that tell are no whole numbers.
    """
    found = (keys.get(f"{arch}.{_BLOCKS}"), keys.get(f"{arch}.{COUNT}"))
    blocks, extra = (value.value if value is not None else None for value in found)
    if not isinstance(blocks, int) or not isinstance(extra, int):
        return range(0)
    return range(max(0, blocks - extra), blocks)


def add_blocks(keys: Mapping[str, MetaValue], layers: int, count: int) -> dict[str, MetaValue]:
    """Key-values, without the architecture's prefix, of a model with ``count`` such blocks."""
    if not count:
        return dict(keys)
    return {**keys, _BLOCKS: u32(layers + count), COUNT: u32(count)}


def drop_blocks(arch: str, keys: Mapping[str, MetaValue]) -> dict[str, MetaValue]:
    """A model's key-values without these blocks: their number, and lists cut to the layers."""
    blocks = count_blocks(arch, keys)
    if not blocks:
        return {key: value for key, value in keys.items() if key != f"{arch}.{COUNT}"}
    found = {}
    for key, value in keys.items():
        name = key.removeprefix(f"{arch}.")
        if name == COUNT and name != key:
            continue
        if name == _BLOCKS and name != key:
            value = u32(blocks.start)
        elif value.kind.startswith("[") and _is_by_block(name, key, value.value, blocks.stop):
            value = MetaValue(value.kind, value.value[: blocks.start])
        found[key] = value
    return found


def _is_by_block(name: str, key: str, values: Any, blocks: int) -> bool:
    return name != key and name not in _NOT_BY_BLOCK and len(values) == blocks
