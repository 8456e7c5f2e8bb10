"""The tower of GLM-4.1V, 4.5V and 4.6V; llama.cpp's "glm4v".

As Qwen2.5-VL's without windows, with learned positions and one more norm behind the patches;
squares of two by two tokens pass a convolution, a matrix with a norm, and a gated MLP.

Refused: biases, other activations than SiLU.
Sources: llama.cpp's tools/mtmd/models/glm4v.cpp, transformers' modeling_glm4v.py.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.config import check_fixed, integer, number
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import frames, tensor, vision_dims
from quantcli.archs.towers.qwen_vl import FIXED, RENAMES
from quantcli.types import MetaValue

_DEFAULTS = {
    "depth": 24, "hidden_size": 1536, "intermediate_size": 13696, "num_heads": 12,
    "image_size": 336, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "in_channels": 3, "out_hidden_size": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_bias": False,
}  # fmt: skip
_FIXED = {**FIXED, "hidden_act": ("silu",), "attention_bias": (False,)}
_BASE = 10000.0
_AT, _OF = "v.blk.{i}", "visual.blocks.{i}"
_RULES = (
    *frames("visual.patch_embed.proj.weight"),
    tensor("v.patch_embd.bias", "visual.patch_embed.proj.bias", "hidden"),
    tensor("v.norm_embd.weight", "visual.post_conv_layernorm.weight", "hidden"),
    tensor(
        "v.position_embd.weight",
        "visual.embeddings.position_embedding.weight",
        "positions",
        "hidden",
    ),
    tensor("v.post_ln.weight", "visual.post_layernorm.weight", "hidden"),
    tensor(f"{_AT}.ln1.weight", f"{_OF}.norm1.weight", "hidden"),
    tensor(f"{_AT}.ln2.weight", f"{_OF}.norm2.weight", "hidden"),
    tensor(f"{_AT}.attn_qkv.weight", f"{_OF}.attn.qkv.weight", "qkv", "hidden"),
    tensor(f"{_AT}.attn_out.weight", f"{_OF}.attn.proj.weight", "hidden", "hidden"),
    tensor(f"{_AT}.ffn_gate.weight", f"{_OF}.mlp.gate_proj.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_up.weight", f"{_OF}.mlp.up_proj.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_down.weight", f"{_OF}.mlp.down_proj.weight", "hidden", "ff"),
    *biased(
        tensor("mm.patch_merger.weight", "visual.downsample.weight", "ff", "hidden", 2, 2),
        tensor("mm.post_norm.weight", "visual.merger.post_projection_norm.weight", "ff"),
    ),
    tensor("mm.model.fc.weight", "visual.merger.proj.weight", "ff", "ff"),
    tensor("mm.gate.weight", "visual.merger.gate_proj.weight", "merger_ff", "ff"),
    tensor("mm.up.weight", "visual.merger.up_proj.weight", "merger_ff", "ff"),
    tensor("mm.down.weight", "visual.merger.down_proj.weight", "ff", "merger_ff"),
)
"""A block's MLP is as wide as the text model, the projector's takes ``intermediate_size``."""


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("vision_config", _DEFAULTS)
    check_fixed(config, _FIXED)
    rope = config.get("rope_parameters") or {}
    check_fixed({**config, **rope}, {"rope_theta": (_BASE, int(_BASE))})
    return config


def _dims(wrapper: Wrapper) -> dict[str, int]:
    config = _vision(wrapper)
    dims = vision_dims(wrapper, config, layers="depth", heads="num_heads")
    return {**dims, "ff": integer(config, "out_hidden_size"), "merger_ff": dims["ff"]}


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    return _RULES


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _vision(wrapper)
    return {
        **vision_keys(wrapper, dims, "glm4v", number(config, "rms_norm_eps")),
        **activation_keys(config),
    }


GLM4V = Tower(
    own=r"visual\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    renames=RENAMES,
)
