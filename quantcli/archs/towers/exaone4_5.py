"""EXAONE 4.5's tower: Qwen2.5-VL's with fewer key-value heads; llama.cpp's "exaone4_5".

Sources: llama.cpp's tools/mtmd/models/exaone4_5.cpp, transformers' modeling_exaone4_5.py.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.config import check_fixed, class_name, integer
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import (
    check_base,
    frames,
    pixel_keys,
    refuse_swapped,
    tensor,
    vision_dims,
)
from quantcli.archs.towers.qwen_vl import (
    EPSILON,
    FIXED,
    GATED_MLP,
    NORMS,
    PROJECTOR,
    RENAMES,
    window_pattern,
)
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_DEFAULTS = {
    "depth": 32, "num_heads": 16, "num_key_value_heads": 8, "patch_size": 14, "image_size": 560,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3, "hidden_size": 3584,
    "intermediate_size": 3420, "hidden_act": "silu", "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_ATTENTION = biased(
    tensor("v.blk.{i}.attn_qkv.weight", "visual.blocks.{i}.attn.qkv.weight", "qkv", "hidden"),
    tensor("v.blk.{i}.attn_out.weight", "visual.blocks.{i}.attn.proj.weight", "hidden", "hidden"),
)


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("vision_config", _DEFAULTS)
    check_fixed(config, {**FIXED, "window_size": (112,)})
    check_base(config, 10000.0)
    return config


def _dims(wrapper: Wrapper) -> dict[str, int]:
    config = _vision(wrapper)
    dims = vision_dims(wrapper, config, layers="depth", heads="num_heads")
    shared = integer(config, "num_key_value_heads")
    if dims["heads"] % shared:
        raise ArchitectureError(
            f"the tower of {class_name(config)} has {dims['heads']} heads over {shared} key-value "
            "heads, expected a multiple"
        )
    head = dims["hidden"] // dims["heads"]
    return {
        **dims,
        "kv_heads": shared,
        "qkv": head * (dims["heads"] + 2 * shared),
        "merged": 4 * dims["hidden"],
    }


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    patches = frames("visual.patch_embed.proj.weight")
    return (*patches, *_ATTENTION, *PROJECTOR, *NORMS, *GATED_MLP)


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _vision(wrapper)
    return {
        **vision_keys(wrapper, dims, "exaone4_5", EPSILON),
        **activation_keys(config),
        **pixel_keys(wrapper),
        "vision.attention.head_count_kv": u32(dims["kv_heads"]),
        "vision.window_size": u32(integer(config, "window_size")),
        "vision.n_wa_pattern": u32(window_pattern(config, dims["layers"])),
    }


EXAONE4_5 = Tower(
    own=r"visual\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    check=refuse_swapped,
    renames=RENAMES,
)
