"""The tower of Qwen3-VL, and of Qwen3.5 and later; llama.cpp's "qwen3vl_merger".

As Qwen2-VL's, with learned positions, and with taps: some layers' outputs are merged and added to
the text model's first layers ("deepstack"). Each tap's merger has a number of its own in the
checkpoint, and in llama.cpp its layer's.

Sources: llama.cpp's tools/mtmd/models/qwen3vl.cpp, transformers' modeling_qwen3_vl.py.
"""

from __future__ import annotations

import math
from typing import Any

from quantcli.archs.config import check_fixed, class_name, integer
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import frames, integers, tensor, vision_dims
from quantcli.archs.towers.qwen_vl import EPSILON, FIXED, RENAMES
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, u32

_DEFAULTS = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
    "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
    "num_position_embeddings": 2304, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
_AT, _OF = "v.blk.{i}", "visual.blocks.{i}"
_BLOCK = biased(
    tensor(f"{_AT}.ln1.weight", f"{_OF}.norm1.weight", "hidden"),
    tensor(f"{_AT}.ln2.weight", f"{_OF}.norm2.weight", "hidden"),
    tensor(f"{_AT}.attn_qkv.weight", f"{_OF}.attn.qkv.weight", "qkv", "hidden"),
    tensor(f"{_AT}.attn_out.weight", f"{_OF}.attn.proj.weight", "hidden", "hidden"),
    tensor(f"{_AT}.ffn_up.weight", f"{_OF}.mlp.linear_fc1.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_down.weight", f"{_OF}.mlp.linear_fc2.weight", "hidden", "ff"),
)
_PROJECTOR = biased(
    tensor("v.post_ln.weight", "visual.merger.norm.weight", "hidden"),
    tensor("mm.0.weight", "visual.merger.linear_fc1.weight", "merged", "merged"),
    tensor("mm.2.weight", "visual.merger.linear_fc2.weight", "width", "merged"),
)


def _tap(number: int, layer: int) -> tuple[Rule, ...]:
    at, of = f"v.deepstack.{layer}", f"visual.deepstack_merger_list.{number}"
    return biased(
        tensor(f"{at}.norm.weight", f"{of}.norm.weight", "merged"),
        tensor(f"{at}.fc1.weight", f"{of}.linear_fc1.weight", "merged", "merged"),
        tensor(f"{at}.fc2.weight", f"{of}.linear_fc2.weight", "width", "merged"),
    )


def _config(wrapper: Wrapper) -> dict[str, Any]:
    """vision_config with the image size that its positions were learned for."""
    # Qwen3.5 has no taps, and Qwen3-VL's published configurations all name theirs.
    config = wrapper.section("vision_config", {**_DEFAULTS, "deepstack_visual_indexes": []})
    check_fixed(config, FIXED)
    positions = integer(config, "num_position_embeddings")
    across = math.isqrt(positions)
    if across * across != positions:
        raise ArchitectureError(
            f"num_position_embeddings {positions} of {class_name(config)} is no square"
        )
    return {"image_size": across * integer(config, "patch_size"), **config}


def _taps(wrapper: Wrapper, layers: int) -> list[int]:
    found = integers(_config(wrapper), "deepstack_visual_indexes")
    if found != sorted(set(found)) or any(not 0 <= layer < layers for layer in found):
        raise ArchitectureError(
            f"deepstack_visual_indexes of {class_name(wrapper.config)} in config.json is {found}, "
            f"expected layers of {layers} in order, in which llama.cpp takes them"
        )
    return found


def _dims(wrapper: Wrapper) -> dict[str, int]:
    dims = vision_dims(wrapper, _config(wrapper), layers="depth", heads="num_heads")
    return {**dims, "merged": 4 * dims["hidden"]}


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    taps = enumerate(_taps(wrapper, integer(_config(wrapper), "depth")))
    bias = tensor("v.patch_embd.bias", "visual.patch_embed.proj.bias", "hidden")
    positions = tensor("v.position_embd.weight", "visual.pos_embed.weight", "positions", "hidden")
    return (
        *frames("visual.patch_embed.proj.weight"),
        bias,
        positions,
        *_BLOCK,
        *_PROJECTOR,
        *(rule for number, layer in taps for rule in _tap(number, layer)),
    )


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    taps = _taps(wrapper, dims["layers"])
    tapped = [layer in taps for layer in range(dims["layers"])]
    return {
        **vision_keys(wrapper, dims, "qwen3vl_merger", EPSILON),
        **activation_keys(_config(wrapper)),
        "vision.spatial_merge_size": u32(2),
        "vision.is_deepstack_layers": array("bool", tapped),
    }


QWEN3_VL = Tower(
    own=r"visual\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    renames=RENAMES,
)
