"""LLaVA 1.5 and 1.6, Granite Vision 3: CLIP or SigLIP and a two-layer projector; llama.cpp's "mlp".

The projector reads some layer's output, mostly the last but one, or several layers' side by side;
what comes after is left out of the file. Notes tell where llama.cpp puts the class token, and what
it leaves out between tiles. Wrappers of LLaVA's class around Pixtral's tower are
`quantcli.archs.towers.pixtral`'s.

Sources: llama.cpp's tools/mtmd/models/llava.cpp and legacy-models/convert_image_encoder_to_gguf.py,
transformers' modeling_llava.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.config import check_fixed, class_name, integer, number
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import block, patches, refuse_swapped, tensor, vision_dims
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, text

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
    tensor("mm.0.weight", "multi_modal_projector.linear_1.weight", "width", "tapped"),
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


def _layers(wrapper: Wrapper, config: dict[str, Any]) -> list[int]:
    """After how many blocks the outputs stand that are projected, in order."""
    count = integer(config, "num_hidden_layers")
    wanted = wrapper.config.get("vision_feature_layer", -2)
    listed = wanted if isinstance(wanted, list) else [wanted]
    found = [
        layer + count + 1 if isinstance(layer, int) and layer < 0 else layer for layer in listed
    ]
    whole = all(isinstance(layer, int) and 0 < layer <= count for layer in found)
    if not found or not whole or found != sorted(set(found)):
        raise ArchitectureError(
            f"vision_feature_layer of {class_name(config)} in config.json is {wanted!r}, expected "
            f"one or several of its {count} layers in order"
        )
    return found


def _dims(wrapper: Wrapper) -> dict[str, int]:
    config = _vision(wrapper)
    dims = vision_dims(wrapper, config)
    has_class = config["model_type"] == _CLIP
    return {
        **dims,
        "layers": _layers(wrapper, config)[-1],
        "tapped": dims["hidden"] * len(_layers(wrapper, config)),
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
        "vision.feature_layer": array("i32", _layers(wrapper, config)),
    }


def _next_rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    return (*_rules(wrapper), tensor("v.image_newline", "image_newline", "width"))


def _next_keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    pairs = wrapper.config.get("image_grid_pinpoints")
    sides = (
        [side for pair in pairs if isinstance(pair, list) for side in pair]
        if isinstance(pairs, list)
        else []
    )
    if not sides or len(sides) % 2 or not all(isinstance(side, int) for side in sides):
        raise ArchitectureError(
            f"image_grid_pinpoints of {class_name(wrapper.config)} in config.json is {pairs!r}, "
            "expected pairs of sides"
        )
    return {
        **_keys(wrapper, dims),
        "vision.mm_patch_merge_type": text("spatial_unpad"),
        "vision.image_grid_pinpoints": array("i32", sides),
    }


def _next_notes(wrapper: Wrapper) -> tuple[str, ...]:
    return (
        *_notes(wrapper),
        "llama.cpp gives the tiles of a large image one after another, without the embedding of a "
        "new line behind each row and with the padding; what the model sees differs",
    )


def _notes(wrapper: Wrapper) -> tuple[str, ...]:
    if _vision(wrapper)["model_type"] != _CLIP:
        return ()
    return (
        "llama.cpp puts CLIP's class token behind the patches of an image and then leaves out the "
        "first of them in its place; what the model sees differs a little from transformers'",
    )


LLAVA = Tower(
    own=r"(vision_tower|multi_modal_projector)\.|image_newline$",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    check=refuse_swapped,
    read_notes=_notes,
    renames=(
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"^model\.(multi_modal_projector\.|image_newline$)", r"\1"),
    ),
    ignored=(
        r"vision_tower\.(post_layernorm|head|embeddings\.position_ids|encoder\.layers\.\d+)(\..*)?",
    ),
)
LLAVA_NEXT = replace(LLAVA, read_rules=_next_rules, to_keys=_next_keys, read_notes=_next_notes)
