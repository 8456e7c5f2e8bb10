"""LLaVA 1.5: a CLIP or SigLIP tower and a two-layer projector; llama.cpp's "mlp".

The projector reads some layer's output, mostly the last but one; what comes after it is left out of
the file. A note tells where llama.cpp puts the class token. Wrappers of the same class around
Pixtral's tower are `quantcli.archs.towers.pixtral`'s.

Sources: llama.cpp's tools/mtmd/models/llava.cpp and legacy-models/convert_image_encoder_to_gguf.py,
transformers' modeling_llava.py.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.config import check_fixed, class_name, integer, number
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import block, patches, refuse_swapped, tensor, vision_dims
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array

_CLIP, _SIGLIP = "clip_vision_model", "siglip_vision_model"
_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224,
}  # fmt: skip
_OF_KIND = {
    _CLIP: {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    _SIGLIP: {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_STRATEGY = {_CLIP: "default", _SIGLIP: "full"}
"""Which tokens go on: all but CLIP's class token."""
_EMBEDDINGS = "vision_tower.embeddings"
_PROJECTOR = biased(
    tensor("mm.0.weight", "multi_modal_projector.linear_1.weight", "width", "hidden"),
    tensor("mm.2.weight", "multi_modal_projector.linear_2.weight", "width", "width"),
)
_CLASS_TOKEN = (
    tensor("v.class_embd", f"{_EMBEDDINGS}.class_embedding", "hidden"),
    *biased(tensor("v.pre_ln.weight", "vision_tower.pre_layrnorm.weight", "hidden")),
)


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    kind = str(wrapper.section("vision_config", {"model_type": _CLIP})["model_type"])
    if kind not in _OF_KIND:
        raise ArchitectureError(
            f"the tower of {class_name(wrapper.config)} is {kind!r}, and quantcli knows "
            f"{_CLIP}, {_SIGLIP} and pixtral"
        )
    settled = {
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        **wrapper.config,
    }
    check_fixed(
        settled,
        {"projector_hidden_act": ("gelu",), "vision_feature_select_strategy": (_STRATEGY[kind],)},
    )
    return wrapper.section("vision_config", {**_DEFAULTS, **_OF_KIND[kind], "model_type": kind})


def _depth(wrapper: Wrapper, config: dict[str, Any]) -> int:
    """How many blocks there are before the output that is projected."""
    layers = integer(config, "num_hidden_layers")
    wanted = wrapper.config.get("vision_feature_layer", -2)
    depth = wanted + layers + 1 if isinstance(wanted, int) and wanted < 0 else wanted
    if not isinstance(depth, int) or not 0 < depth <= layers:
        raise ArchitectureError(
            f"vision_feature_layer of {class_name(config)} in config.json is {wanted!r}, expected "
            f"one of its {layers} layers"
        )
    return depth


def _dims(wrapper: Wrapper) -> dict[str, int]:
    config = _vision(wrapper)
    dims = vision_dims(wrapper, config)
    has_class = config["model_type"] == _CLIP
    return {
        **dims,
        "layers": _depth(wrapper, config),
        "positions": dims["positions"] + has_class,
    }


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    is_clip = _vision(wrapper)["model_type"] == _CLIP
    bias = tensor("v.patch_embd.bias", f"{_EMBEDDINGS}.patch_embedding.bias", "hidden")
    return (
        patches(f"{_EMBEDDINGS}.patch_embedding.weight"),
        tensor(
            "v.position_embd.weight",
            f"{_EMBEDDINGS}.position_embedding.weight",
            "positions",
            "hidden",
        ),
        *(_CLASS_TOKEN if is_clip else (bias,)),
        *block("v", "vision_tower.encoder.layers"),
        *_PROJECTOR,
    )


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _vision(wrapper)
    return {
        **vision_keys(wrapper, dims, "mlp", number(config, "layer_norm_eps")),
        **activation_keys(config),
        "vision.feature_layer": array("i32", [dims["layers"]]),
    }


def _notes(wrapper: Wrapper) -> tuple[str, ...]:
    if _vision(wrapper)["model_type"] != _CLIP:
        return ()
    return (
        "llama.cpp puts CLIP's class token behind the patches of an image and then leaves out the "
        "first of them in its place; what the model sees differs a little from transformers'",
    )


LLAVA = Tower(
    own=r"(vision_tower|multi_modal_projector)\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    check=refuse_swapped,
    read_notes=_notes,
    renames=(
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ),
    ignored=(
        r"vision_tower\.(post_layernorm|head|embeddings\.position_ids|encoder\.layers\.\d+)(\..*)?",
    ),
)
