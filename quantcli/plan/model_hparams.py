"""What the mixture rules ask of a model: its architecture, blocks, experts and shared heads.

Read from GGUF key-values, as llama.cpp's loader does (``load_hparams`` in src/llama-model.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantcli.archs.towers import CLIP
from quantcli.errors import PlanError
from quantcli.plan.names import block_index
from quantcli.types import MetaValue

_70B_BLOCKS = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
"""Architectures in which so many blocks make the size class that llama.cpp calls 70B."""


@dataclass(frozen=True, slots=True)
class Traits:
    """A model, as far as the mixture rules look at it."""

    arch: str
    blocks: int
    """Blocks, those for multi-token prediction included."""
    experts: int
    """Experts per block, 0 in a dense model."""
    queries_per_key: int
    """Query heads that share one key-value head, in block 0; 0 without attention."""
    is_70b: bool
    mtp: int = 0
    """How many of the blocks, the last ones, are for multi-token prediction."""

    def predicts_further(self, name: str) -> bool:
        """Whether a tensor belongs to a block for multi-token prediction, which nothing runs."""
        index = block_index(name)
        return index is not None and index >= self.blocks - self.mtp


PROJECTOR = CLIP
"""The architecture of an image or audio tower's file (mmproj), for which no rule counts blocks."""


def read_traits(metadata: Mapping[str, MetaValue]) -> Traits:
    """The traits of the model with these key-values; PlanError when a necessary key is missing."""
    arch_value = metadata.get("general.architecture")
    if arch_value is None:
        raise PlanError("the model has no general.architecture, so no plan can be made for it")
    arch = str(arch_value.value)
    if arch == PROJECTOR:
        return Traits(arch, 0, 0, 0, False)
    blocks = _integer(metadata, f"{arch}.block_count", None)
    extra = _integer(metadata, f"{arch}.nextn_predict_layers", 0)
    experts = _integer(metadata, f"{arch}.expert_count", 0)
    heads = _integer(metadata, f"{arch}.attention.head_count", 0)
    key_heads = _integer(metadata, f"{arch}.attention.head_count_kv", heads)
    is_70b = _70B_BLOCKS.get(arch) == blocks - extra
    if arch in ("llama", "llama-embed"):
        is_70b = is_70b and experts != 8 and heads != key_heads
    return Traits(arch, blocks, experts, heads // key_heads if key_heads else 0, is_70b, extra)


def _integer(metadata: Mapping[str, MetaValue], key: str, default: int | None) -> int:
    """An integer key-value, or the first of an array with one per block."""
    found = metadata.get(key)
    if found is None:
        if default is None:
            raise PlanError(f"the model has no key-value {key}, so no plan can be made for it")
        return default
    value = found.value[0] if found.kind.startswith("[") and len(found.value) else found.value
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"key-value {key} should be an integer, found {found.value!r}") from None
