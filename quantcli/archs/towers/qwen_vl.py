"""The towers of Qwen2-VL and Qwen2.5-VL; llama.cpp's "qwen2vl_merger" and "qwen2.5vl_merger".

Patches of two frames at once, rotated in two dimensions; four neighbours become one token. In 2.5
most layers look through windows, and the MLP is gated. llama.cpp's graph writes some sizes as
constants: two frames, squares of two by two, windows of 112 pixels, epsilons of 1e-6 (which
transformers' code has as constants too).

Sources: llama.cpp's tools/mtmd/models/qwen2vl.cpp, transformers' modeling_qwen2_5_vl.py.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.config import Config, check_fixed, class_name, integer, number
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import (
    frames,
    integers,
    refuse_swapped,
    tensor,
    thirds,
    vision_dims,
)
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

FIXED = {"temporal_patch_size": (2,), "spatial_merge_size": (2,), "in_channels": (3,)}
EPSILON = 1e-6
RENAMES = ((r"^(model\.|thinker\.)?visual\.", "visual."),)
_SHARED = {
    "depth": 32, "num_heads": 16, "patch_size": 14, "image_size": 560,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
}  # fmt: skip
_QWEN2 = {**_SHARED, "embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"}
_QWEN2_5 = {
    **_SHARED, "hidden_size": 3584, "intermediate_size": 3420, "hidden_act": "silu",
    "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_AT, _OF = "v.blk.{i}", "visual.blocks.{i}"
_ATTENTION = (
    *thirds(_AT, f"{_OF}.attn.qkv"),
    *biased(tensor(f"{_AT}.attn_out.weight", f"{_OF}.attn.proj.weight", "hidden", "hidden")),
)
PROJECTOR = biased(
    tensor("mm.0.weight", "visual.merger.mlp.0.weight", "merged", "merged"),
    tensor("mm.2.weight", "visual.merger.mlp.2.weight", "width", "merged"),
)
GATED_MLP = biased(
    tensor(f"{_AT}.ffn_gate.weight", f"{_OF}.mlp.gate_proj.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_up.weight", f"{_OF}.mlp.up_proj.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_down.weight", f"{_OF}.mlp.down_proj.weight", "hidden", "ff"),
)
NORMS = (
    tensor(f"{_AT}.ln1.weight", f"{_OF}.norm1.weight", "hidden"),
    tensor(f"{_AT}.ln2.weight", f"{_OF}.norm2.weight", "hidden"),
    tensor("v.post_ln.weight", "visual.merger.ln_q.weight", "hidden"),
)


def _qwen2(wrapper: Wrapper) -> dict[str, Any]:
    """vision_config with the names that other towers have."""
    config = wrapper.section("vision_config", _QWEN2)
    width = integer(config, "embed_dim")
    return {
        **config,
        "hidden_size": width,
        "intermediate_size": int(width * number(config, "mlp_ratio")),
    }


def _qwen2_5(wrapper: Wrapper) -> dict[str, Any]:
    return wrapper.section("vision_config", _QWEN2_5)


def _dims(wrapper: Wrapper, config: dict[str, Any]) -> dict[str, int]:
    check_fixed(config, FIXED)
    dims = vision_dims(wrapper, config, layers="depth", heads="num_heads")
    return {**dims, "merged": 4 * dims["hidden"]}


def _qwen2_rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    mlp = (
        tensor(f"{_AT}.ffn_up.weight", f"{_OF}.mlp.fc1.weight", "ff", "hidden"),
        tensor(f"{_AT}.ffn_down.weight", f"{_OF}.mlp.fc2.weight", "hidden", "ff"),
    )
    patches = frames("visual.patch_embed.proj.weight")
    return (*patches, *_ATTENTION, *PROJECTOR, *biased(*NORMS, *mlp))


def _qwen2_5_rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    patches = frames("visual.patch_embed.proj.weight")
    return (*patches, *_ATTENTION, *PROJECTOR, *NORMS, *GATED_MLP)


def _qwen2_keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    return {
        **vision_keys(wrapper, dims, "qwen2vl_merger", EPSILON),
        **activation_keys(_qwen2(wrapper)),
    }


def window_pattern(config: Config, layers: int) -> int:
    """How many layers there are from one with full attention to the next, the first included.

    ArchitectureError where they are not evenly spaced, as llama.cpp has them.
    """
    full = integers(config, "fullatt_block_indexes")
    every = full[0] + 1 if full else layers + 1
    if full != list(range(every - 1, layers, every)):
        raise ArchitectureError(
            f"fullatt_block_indexes of {class_name(config)} in config.json is {full}, but "
            "llama.cpp's layers with full attention are evenly spaced"
        )
    return every


def _qwen2_5_keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _qwen2_5(wrapper)
    check_fixed(config, {"window_size": (112,)})
    return {
        **vision_keys(wrapper, dims, "qwen2.5vl_merger", EPSILON),
        **activation_keys(config),
        "vision.n_wa_pattern": u32(window_pattern(config, dims["layers"])),
    }


QWEN2_VL = Tower(
    own=r"visual\.",
    read_dims=lambda wrapper: _dims(wrapper, _qwen2(wrapper)),
    read_rules=_qwen2_rules,
    to_keys=_qwen2_keys,
    check=refuse_swapped,
    renames=RENAMES,
)
QWEN2_5_VL = Tower(
    own=r"visual\.",
    read_dims=lambda wrapper: _dims(wrapper, _qwen2_5(wrapper)),
    read_rules=_qwen2_5_rules,
    to_keys=_qwen2_5_keys,
    check=refuse_swapped,
    renames=RENAMES,
)
