"""LFM2-VL's tower: SigLIP 2 without a fixed image size; llama.cpp's "lfm2".

Patches are rows of a matrix over pixels, colours last, which llama.cpp takes as a convolution.
Learned positions are resized to an image's own grid.

Refused: biases missing from the projector, an activation other than GELU.
Sources: llama.cpp's tools/mtmd/models/siglip.cpp, transformers' modeling_lfm2_vl.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from quantcli.archs.config import check_fixed, class_name, integer, number
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import patch_rows, tensor, vision_dims
from quantcli.archs.towers.siglip import ENCODER, POOLING_HEAD, RENAMES
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "patch_size": 16, "num_patches": 256,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_OUTER = {
    "downsample_factor": 2, "projector_hidden_size": 2560, "projector_hidden_act": "gelu",
    "projector_bias": True, "vision_feature_layer": -1,
}  # fmt: skip
_FIXED = {
    "projector_hidden_act": ("gelu",), "projector_bias": (True,), "vision_feature_layer": (-1,),
}  # fmt: skip
_PATCHES = patch_rows("vision_tower.embeddings.patch_embedding.weight", channels_last=True)
_NORM = biased(tensor("mm.input_norm.weight", "multi_modal_projector.layer_norm.weight", "merged"))
_PROJECTOR = biased(
    tensor("mm.1.weight", "multi_modal_projector.linear_1.weight", "wide", "merged"),
    tensor("mm.2.weight", "multi_modal_projector.linear_2.weight", "width", "wide"),
)


def _outer(wrapper: Wrapper) -> dict[str, Any]:
    settled = {**_OUTER, **wrapper.config}
    check_fixed(settled, _FIXED)
    return settled


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("vision_config", _DEFAULTS)
    count = integer(config, "num_patches")
    across = math.isqrt(count)
    if across * across != count:
        raise ArchitectureError(f"num_patches {count} of {class_name(config)} is no square")
    return {**config, "image_size": across * integer(config, "patch_size")}


def _dims(wrapper: Wrapper) -> dict[str, int]:
    outer, dims = _outer(wrapper), vision_dims(wrapper, _vision(wrapper))
    return {
        **dims,
        "merged": dims["hidden"] * integer(outer, "downsample_factor") ** 2,
        "wide": integer(outer, "projector_hidden_size"),
    }


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    norm = (replace(rule, optional=True) for rule in _NORM)
    return (*ENCODER, _PATCHES, *norm, *_PROJECTOR)


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _vision(wrapper)
    return {
        **vision_keys(wrapper, dims, "lfm2", number(config, "layer_norm_eps")),
        **activation_keys(config),
        "vision.projector.scale_factor": u32(integer(_outer(wrapper), "downsample_factor")),
    }


LFM2_VL = Tower(
    own=r"(vision_tower|multi_modal_projector)\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    renames=RENAMES,
    ignored=(POOLING_HEAD,),
)
