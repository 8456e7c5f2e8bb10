"""What a checkpoint's tensor names and shapes say by themselves: blocks, experts, linear layers.

Where no table knows a family, a matrix is taken for a linear layer if it is the two-dimensional
``….weight`` of a numbered block and its name is not that of an embedding, a norm, a convolution, a
router or a part of a vision or audio tower. Experts are numbered below a component such as
"experts", or stacked in tensors of three dimensions. GGUF's names of them come from the ``gguf``
package's map of names, which llama.cpp's converter uses too.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from quantcli.types import PackedType, TensorInfo

SUFFIX = ".weight"

_BLOCK = re.compile(r"(?P<stem>(?:.*?\.)??)(?P<index>\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"(?P<head>(?:.*\.)?\w*experts?\w*)\.(?P<index>\d+)\.(?P<tail>.+)")
_TOWER = re.compile(
    r"(^|\.)(visual|vision|vision_\w+|image_\w+|audio_\w+|vit|sam_\w+|\w*multi_?modal_projector"
    r"|mm_projector|modality_projection|resampler|patch_merger|perceiver\w*)(\.|$)"
)
_EMBEDDING = re.compile(
    r"(\w*_)?embed(ding)?s?(_in|_tokens\w*|_positions?)?|wte|wpe|emb|embd|relative_attention_bias"
)
_POSITIONS = re.compile(r"wpe|\w*(position|token_type|segment|relative)\w*")
_ROUTER = re.compile(r"gate|wg|gating|\w*expert_gate|\w*router\w*")
_PER_LAYER = "embed_tokens_per_layer"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: its block's list and number, and its name below that."""

    stem: str
    block: int | None
    rest: str


@lru_cache(maxsize=1 << 18)
def place_of(name: str) -> Place:
    """The place of a stored tensor, by the first number in its name."""
    found = _BLOCK.fullmatch(name)
    if found is None:
        return Place("", None, name)
    return Place(found["stem"], int(found["index"]), found["rest"])


def leaf_of(name: str) -> str:
    """The last component of a name, its ending left out."""
    return name.removesuffix(SUFFIX).rpartition(".")[2]


def in_tower(name: str) -> bool:
    """Whether it belongs to a vision or audio tower, or to what joins one to the text model."""
    return _TOWER.search(name) is not None


def is_embedding(name: str) -> bool:
    """Whether it is a table that rows are looked up in."""
    return _EMBEDDING.fullmatch(leaf_of(name)) is not None or name == f"shared{SUFFIX}"


def is_per_layer(name: str) -> bool:
    """Whether it is a table with rows for every layer."""
    return leaf_of(name) == _PER_LAYER


def counts_tokens(name: str) -> bool:
    """Whether it is an embedding of tokens, not of places in a text or of kinds of them."""
    return is_embedding(name) and _POSITIONS.fullmatch(leaf_of(name)) is None


def holds_floats(info: TensorInfo) -> bool:
    """Whether its values are weights rather than indices."""
    return isinstance(info.dtype, PackedType) or info.dtype.startswith(("F", "BF"))


def main_list(stored: Mapping[str, TensorInfo]) -> str:
    """What stands before the numbers of the model's blocks: the list with most weights."""
    sizes: Counter[str] = Counter()
    for name, info in stored.items():
        place = place_of(name)
        if place.block is not None and not in_tower(name):
            sizes[place.stem] += info.elements
    return max(sizes, key=lambda stem: sizes[stem], default="")


def expert_blocks(names: Iterable[str]) -> frozenset[str]:
    """The modules that have experts, by their names with a dot at the end."""
    found = set()
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.endswith("experts"):
                found.add("".join(f"{each}." for each in parts[:at]))
    return frozenset(found)


def is_router(name: str, info: TensorInfo, mixtures: Collection[str]) -> bool:
    """Whether it chooses experts: a gate beside some of the modules ``mixtures``, or so called."""
    parts = name.removesuffix(SUFFIX).split(".")
    if any("router" in part for part in parts) or info.shape[0] == 1:
        return True
    return any(
        _ROUTER.fullmatch(part) and "".join(f"{each}." for each in parts[:at]) in mixtures
        for at, part in enumerate(parts)
    )


def is_linear(name: str, info: TensorInfo, mixtures: Collection[str]) -> bool:
    """Whether it is the weight of a linear layer in a numbered block."""
    leaf = leaf_of(name)
    return (
        name.endswith(SUFFIX)
        and len(info.shape) == 2
        and holds_floats(info)
        and place_of(name).block is not None
        and not in_tower(name)
        and not is_embedding(name)
        and "norm" not in leaf
        and "conv" not in leaf
        and not is_router(name, info, mixtures)
    )


def numbered_experts(
    names: Iterable[str], stored: Mapping[str, TensorInfo]
) -> dict[str, list[str]]:
    """Patterns over experts ``{e}``, and the tensors of each in order.

    Only where the numbers are whole and all have one shape and dtype.
    """
    groups: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        found = _EXPERT.fullmatch(name)
        if found is not None and place_of(name).rest != name:
            groups[f"{found['head']}.{{e}}.{found['tail']}"][int(found["index"])] = name
    whole = {}
    for pattern, members in groups.items():
        ordered = [members[index] for index in sorted(members)]
        alike = len({(stored[name].shape, stored[name].dtype) for name in ordered}) == 1
        if alike and sorted(members) == list(range(len(ordered))) and len(ordered) > 1:
            whole[pattern] = ordered
    return whole


@cache
def _roles() -> dict[str, str]:
    """GGUF's name within a block by that of checkpoints, the shortest where there are several."""
    from gguf import TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    found: dict[str, str] = {}
    for tensor, names in TensorNameMap.block_mappings_cfg.items():
        head, _, role = TENSOR_NAMES[tensor].partition("blk.{bid}.")
        if head or not role:
            continue
        for name in names:
            _, inside, rest = name.partition("{bid}.")
            if inside:
                found[rest] = min(found.get(rest, role), role, key=len)
    return found


def block_name(block: int, rest: str) -> str:
    """What a GGUF calls a block's tensor; its own name, where no family is known to have it.

    ``rest`` is the name below the block, without number of an expert and ending.
    """
    return f"blk.{block}.{_roles().get(rest, rest)}{SUFFIX}"
