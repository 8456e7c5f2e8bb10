"""Llama 4's tower: a vision transformer rotated in two dimensions; llama.cpp's "llama4".

Patches are rows of a matrix rather than a convolution, and the class token comes last here and in
llama.cpp. Squares of two by two tokens pass a two-layer MLP and one more matrix.

Sources: llama.cpp's tools/mtmd/models/llama4.cpp, transformers' modeling_llama4.py.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.config import check_fixed, class_name, integer, number, positive
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import check_base, tensor, vision_dims
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 5632, "num_hidden_layers": 34,
    "num_attention_heads": 16, "image_size": 448, "patch_size": 14, "hidden_act": "gelu",
    "norm_eps": 1e-5, "pixel_shuffle_ratio": 0.5, "vision_output_dim": 7680,
    "projector_input_dim": 4096, "projector_output_dim": 4096,
    "vision_feature_select_strategy": "default",
}  # fmt: skip
_FIXED = {
    "hidden_act": ("gelu",),
    "norm_eps": (1e-5,),
    "vision_feature_select_strategy": ("default",),
}
_BASE = 10000.0
_AT, _OF = "v.blk.{i}", "vision_model.model.layers.{i}"
_BLOCK = biased(
    tensor(f"{_AT}.ln1.weight", f"{_OF}.input_layernorm.weight", "hidden"),
    tensor(f"{_AT}.ln2.weight", f"{_OF}.post_attention_layernorm.weight", "hidden"),
    *(
        tensor(f"{_AT}.attn_{name}.weight", f"{_OF}.self_attn.{proj}.weight", "hidden", "hidden")
        for name, proj in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj"))
    ),
    tensor(f"{_AT}.ffn_up.weight", f"{_OF}.mlp.fc1.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_down.weight", f"{_OF}.mlp.fc2.weight", "hidden", "ff"),
)
_OUTSIDE = (
    tensor("v.patch_embd.weight", "vision_model.patch_embedding.linear.weight", "hidden", "pixels"),
    tensor("v.class_embd", "vision_model.class_embedding", "hidden"),
    tensor(
        "v.position_embd.weight", "vision_model.positional_embedding_vlm", "positions", "hidden"
    ),
    *biased(
        tensor("v.pre_ln.weight", "vision_model.layernorm_pre.weight", "hidden"),
        tensor("v.post_ln.weight", "vision_model.layernorm_post.weight", "hidden"),
    ),
)
_PROJECTOR = (
    tensor("mm.model.mlp.1.weight", "vision_model.vision_adapter.mlp.fc1.weight", "wide", "merged"),
    tensor("mm.model.mlp.2.weight", "vision_model.vision_adapter.mlp.fc2.weight", "out", "out"),
    tensor("mm.model.fc.weight", "multi_modal_projector.linear_1.weight", "width", "seen"),
)


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("vision_config", _DEFAULTS)
    check_fixed(config, _FIXED)
    check_base(config, _BASE)
    return config


def _merge(config: dict[str, Any]) -> int:
    ratio = positive(config, "pixel_shuffle_ratio")
    if 1 / ratio != int(1 / ratio):
        raise ArchitectureError(
            f"pixel_shuffle_ratio {ratio:g} of {class_name(config)} is not one over a whole number"
        )
    return int(1 / ratio)


def _dims(wrapper: Wrapper) -> dict[str, int]:
    config = _vision(wrapper)
    dims = vision_dims(wrapper, config)
    return {
        **dims,
        "positions": dims["positions"] + 1,
        "merged": dims["hidden"] * _merge(config) ** 2,
        "wide": integer(config, "projector_input_dim"),
        "out": integer(config, "projector_output_dim"),
        "seen": integer(config, "vision_output_dim"),
    }


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    return (*_OUTSIDE, *_BLOCK, *_PROJECTOR)


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _vision(wrapper)
    return {
        **vision_keys(wrapper, dims, "llama4", number(config, "norm_eps")),
        **activation_keys(config),
        "vision.projector.scale_factor": u32(_merge(config)),
    }


def _notes(wrapper: Wrapper) -> tuple[str, ...]:
    return (
        "llama.cpp gives the tokens of a Llama 4 image column by column, where transformers gives "
        "them row by row; what the model sees differs",
    )


LLAMA4 = Tower(
    own=r"(vision_model|multi_modal_projector)\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    read_notes=_notes,
    renames=((r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),),
    ignored=(r"vision_model\.rotary_embedding\..*",),
)
