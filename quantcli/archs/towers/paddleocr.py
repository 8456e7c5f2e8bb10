"""PaddleOCR-VL's tower: SigLIP rotated in two dimensions, any image size; llama.cpp's "paddleocr".

Learned positions are resized to an image's own grid; squares of two by two tokens are projected.

Sources: llama.cpp's tools/mtmd/models/paddleocr.cpp, transformers' modeling_paddleocr_vl.py.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.config import check_fixed, number
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import check_base, patches, pixel_keys, tensor, vision_dims
from quantcli.archs.towers.siglip import ENCODER
from quantcli.types import MetaValue

_DEFAULTS = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "spatial_merge_size": 2,
}  # fmt: skip
_RULES = (
    *ENCODER,
    patches("vision_tower.embeddings.patch_embedding.weight"),
    *biased(
        tensor("mm.input_norm.weight", "mlp_AR.pre_norm.weight", "hidden"),
        tensor("mm.1.weight", "mlp_AR.linear_1.weight", "merged", "merged"),
        tensor("mm.2.weight", "mlp_AR.linear_2.weight", "width", "merged"),
    ),
)


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("vision_config", _DEFAULTS)
    check_fixed(config, {"spatial_merge_size": (2,)})
    check_base(config, 10000.0)
    return config


def _dims(wrapper: Wrapper) -> dict[str, int]:
    dims = vision_dims(wrapper, _vision(wrapper))
    return {**dims, "merged": 4 * dims["hidden"]}


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    return _RULES


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _vision(wrapper)
    return {
        **vision_keys(wrapper, dims, "paddleocr", number(config, "layer_norm_eps")),
        **activation_keys(config),
        **pixel_keys(wrapper),
    }


PADDLEOCR_VL = Tower(
    own=r"(vision_tower|mlp_AR)\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    renames=(
        (r"^(model\.)?visual\.(vision_model\.)?", "vision_tower."),
        (r"^(model\.)?(projector|mlp_AR)\.", "mlp_AR."),
    ),
    ignored=(r"vision_tower\.(head|embeddings\.packing_position_embedding)\..*",),
)
