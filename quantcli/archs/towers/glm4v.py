"""The towers of GLM-4.1V, 4.5V and 4.6V and of GLM-OCR; llama.cpp's "glm4v".

As Qwen2.5-VL's without windows, with learned positions and one more norm behind the patches;
squares of two by two tokens pass a convolution, a matrix with a norm, and a gated MLP. GLM-OCR has
neither the positions nor that norm, but biases, and norms on queries and keys.

Refused: other activations than SiLU, biases where the class has none and the reverse.
Sources: llama.cpp's tools/mtmd/models/glm4v.cpp, transformers' modeling_glm4v.py,
modeling_glm_ocr.py.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.config import check_fixed, integer, number
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import check_base, frames, tensor, vision_dims
from quantcli.archs.towers.qwen_vl import FIXED, RENAMES
from quantcli.types import MetaValue

_DEFAULTS = {
    "depth": 24, "hidden_size": 1536, "intermediate_size": 13696, "num_heads": 12,
    "image_size": 336, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "in_channels": 3, "out_hidden_size": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_bias": False,
}  # fmt: skip
_FIXED = {**FIXED, "hidden_act": ("silu",), "attention_bias": (False,)}
_OCR = {
    **_DEFAULTS, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
    "out_hidden_size": 1536, "attention_bias": True,
}  # fmt: skip
_OCR_FIXED = {**_FIXED, "attention_bias": (True,)}
_BASE = 10000.0
_AT, _OF = "v.blk.{i}", "visual.blocks.{i}"
_PATCHES = (
    *frames("visual.patch_embed.proj.weight"),
    tensor("v.patch_embd.bias", "visual.patch_embed.proj.bias", "hidden"),
)
_PLACES = (
    tensor("v.norm_embd.weight", "visual.post_conv_layernorm.weight", "hidden"),
    tensor(
        "v.position_embd.weight",
        "visual.embeddings.position_embedding.weight",
        "positions",
        "hidden",
    ),
)
_NORMS = (
    tensor("v.post_ln.weight", "visual.post_layernorm.weight", "hidden"),
    tensor(f"{_AT}.ln1.weight", f"{_OF}.norm1.weight", "hidden"),
    tensor(f"{_AT}.ln2.weight", f"{_OF}.norm2.weight", "hidden"),
)
_HEAD_NORMS = tuple(
    tensor(f"{_AT}.attn_{name}_norm.weight", f"{_OF}.attn.{name}_norm.weight", "head_dim")
    for name in "qk"
)
_MATRICES = (
    tensor(f"{_AT}.attn_qkv.weight", f"{_OF}.attn.qkv.weight", "qkv", "hidden"),
    tensor(f"{_AT}.attn_out.weight", f"{_OF}.attn.proj.weight", "hidden", "hidden"),
    tensor(f"{_AT}.ffn_gate.weight", f"{_OF}.mlp.gate_proj.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_up.weight", f"{_OF}.mlp.up_proj.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_down.weight", f"{_OF}.mlp.down_proj.weight", "hidden", "ff"),
)
_PROJECTOR = (
    *biased(
        tensor("mm.patch_merger.weight", "visual.downsample.weight", "out", "hidden", 2, 2),
        tensor("mm.post_norm.weight", "visual.merger.post_projection_norm.weight", "out"),
    ),
    tensor("mm.model.fc.weight", "visual.merger.proj.weight", "out", "out"),
    tensor("mm.gate.weight", "visual.merger.gate_proj.weight", "merger_ff", "out"),
    tensor("mm.up.weight", "visual.merger.up_proj.weight", "merger_ff", "out"),
    tensor("mm.down.weight", "visual.merger.down_proj.weight", "out", "merger_ff"),
)


def _vision(wrapper: Wrapper, *, ocr: bool = False) -> dict[str, Any]:
    config = wrapper.section("vision_config", _OCR if ocr else _DEFAULTS)
    check_fixed(config, _OCR_FIXED if ocr else _FIXED)
    check_base(config, _BASE)
    return config


def _dims(wrapper: Wrapper) -> dict[str, int]:
    """A block's MLP is as wide as the text model; the projector's takes ``intermediate_size``."""
    config = _vision(wrapper)
    dims = vision_dims(wrapper, config, layers="depth", heads="num_heads")
    out = integer(config, "out_hidden_size")
    return {**dims, "out": out, "ff": out, "merger_ff": dims["ff"]}


def _ocr_dims(wrapper: Wrapper) -> dict[str, int]:
    config = _vision(wrapper, ocr=True)
    dims = vision_dims(wrapper, config, layers="depth", heads="num_heads")
    out = integer(config, "out_hidden_size")
    head = dims["hidden"] // dims["heads"]
    # transformers' code multiplies by the colours.
    return {**dims, "out": out, "head_dim": head, "merger_ff": 3 * out}


def _keys(wrapper: Wrapper, dims: Dims, config: dict[str, Any]) -> dict[str, MetaValue]:
    return {
        **vision_keys(wrapper, dims, "glm4v", number(config, "rms_norm_eps")),
        **activation_keys(config),
    }


GLM4V = Tower(
    own=r"visual\.",
    read_dims=_dims,
    read_rules=lambda wrapper: (*_PATCHES, *_PLACES, *_NORMS, *_MATRICES, *_PROJECTOR),
    to_keys=lambda wrapper, dims: _keys(wrapper, dims, _vision(wrapper)),
    renames=RENAMES,
)
GLM_OCR = Tower(
    own=r"visual\.",
    read_dims=_ocr_dims,
    read_rules=lambda wrapper: (
        *_PATCHES, *_NORMS, *_HEAD_NORMS, *biased(*_MATRICES), *_PROJECTOR,
    ),
    to_keys=lambda wrapper, dims: _keys(wrapper, dims, _vision(wrapper, ocr=True)),
    renames=RENAMES,
)  # fmt: skip
