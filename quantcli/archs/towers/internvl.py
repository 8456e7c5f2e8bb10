"""InternVL 2.5 to 3.5 and Intern-S1; llama.cpp's "internvl".

A vision transformer with a class token and scaled layers; squares of patches side by side are
normed and projected. llama.cpp puts the class token behind the patches and leaves the learned
positions where they were, so that each patch gets its neighbour's; the file holds what its
converter writes.

The authors' own code (InternVLChatModel) has other names, and q, k and v in one matrix.

Refused: RMSNorm, except in the size at which llama.cpp takes it for granted.
Sources: llama.cpp's tools/mtmd/models/internvl.cpp, transformers' modeling_internvl.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.config import check_fixed, class_name, integer, number, positive
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import patches, tensor, thirds, vision_dims
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_DEFAULTS = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 448, "patch_size": 14, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "norm_type": "layer_norm", "use_mean_pooling": True,
    "use_absolute_position_embeddings": True, "use_mask_token": False,
}  # fmt: skip
_FIXED = {
    "use_mean_pooling": (True,),
    "use_absolute_position_embeddings": (True,),
    "use_mask_token": (False,),
}
_CHAT = "InternVLChatModel"
_LAYER = r"^(vision_tower\.encoder\.layer\.\d+)\."
_CHAT_NAMES = (
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    (r"^vision_model\.embeddings\.", "vision_tower.embeddings."),
    (r"^(vision_tower\.embeddings)\.class_embedding$", r"\1.cls_token"),
    (r"^(vision_tower\.embeddings)\.position_embedding$", r"\1.position_embeddings"),
    (r"^(vision_tower\.embeddings)\.patch_embedding\.", r"\1.patch_embeddings.projection."),
    (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
    (rf"{_LAYER}attn\.proj\.", r"\1.attention.projection_layer."),
    (rf"{_LAYER}attn\.", r"\1.attention."),
    (rf"{_LAYER}ls([12])$", r"\1.lambda_\2"),
    (rf"{_LAYER}norm1\.", r"\1.layernorm_before."),
    (rf"{_LAYER}norm2\.", r"\1.layernorm_after."),
)
"""From the names of InternVLChatModel to transformers'."""
_RMS_SIZE = (3200, 45)
_AT, _OF = "v.blk.{i}", "vision_tower.encoder.layer.{i}"
_EMBEDDINGS = "vision_tower.embeddings"
_ATTENTION = tuple(
    tensor(f"{_AT}.attn_{name}.weight", f"{_OF}.attention.{name}_proj.weight", "hidden", "hidden")
    for name in "qkv"
)
_APART = (*_ATTENTION, *(replace(bias, optional=True) for bias in biased(*_ATTENTION)[1::2]))
_FUSED = tuple(
    replace(rule, optional=rule.name.endswith("bias"))
    for rule in thirds(_AT, f"{_OF}.attention.qkv")
)
_BLOCK = (
    *(
        tensor(
            f"{_AT}.attn_{name}_norm.weight",
            f"{_OF}.attention.{name}_norm.weight",
            "hidden",
            optional=True,
        )
        for name in "qk"
    ),
    tensor(f"{_AT}.ls1.weight", f"{_OF}.lambda_1", "hidden"),
    tensor(f"{_AT}.ls2.weight", f"{_OF}.lambda_2", "hidden"),
    *biased(
        tensor(
            f"{_AT}.attn_out.weight", f"{_OF}.attention.projection_layer.weight", "hidden", "hidden"
        ),
        tensor(f"{_AT}.ffn_up.weight", f"{_OF}.mlp.fc1.weight", "ff", "hidden"),
        tensor(f"{_AT}.ffn_down.weight", f"{_OF}.mlp.fc2.weight", "hidden", "ff"),
    ),
)
_NORMS = (
    tensor(f"{_AT}.ln1.weight", f"{_OF}.layernorm_before.weight", "hidden"),
    tensor(f"{_AT}.ln2.weight", f"{_OF}.layernorm_after.weight", "hidden"),
)
_PROJECTOR = biased(
    tensor("mm.model.mlp.0.weight", "multi_modal_projector.layer_norm.weight", "merged"),
    tensor("mm.model.mlp.1.weight", "multi_modal_projector.linear_1.weight", "width", "merged"),
    tensor("mm.model.mlp.3.weight", "multi_modal_projector.linear_2.weight", "width", "width"),
)
_OUTSIDE = (
    patches(f"{_EMBEDDINGS}.patch_embeddings.projection.weight"),
    tensor("v.patch_embd.bias", f"{_EMBEDDINGS}.patch_embeddings.projection.bias", "hidden"),
    replace(tensor("v.class_embd", f"{_EMBEDDINGS}.cls_token", "hidden"), stored=(1, 1, "hidden")),
    replace(
        tensor(
            "v.position_embd.weight", f"{_EMBEDDINGS}.position_embeddings", "positions", "hidden"
        ),
        stored=(1, "positions", "hidden"),
    ),
)


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("vision_config", _DEFAULTS)
    check_fixed(config, _FIXED)
    check_fixed(
        {"projector_hidden_act": "gelu", **wrapper.config}, {"projector_hidden_act": ("gelu",)}
    )
    return config


def _merge(wrapper: Wrapper) -> int:
    """The side of the squares of patches that become one token."""
    ratio = positive({"downsample_ratio": 0.5, **wrapper.config}, "downsample_ratio")
    if 1 / ratio != int(1 / ratio):
        raise ArchitectureError(
            f"downsample_ratio {ratio:g} of {class_name(wrapper.config)} is not one over a whole "
            "number"
        )
    return int(1 / ratio)


def _dims(wrapper: Wrapper) -> dict[str, int]:
    dims = vision_dims(wrapper, _vision(wrapper))
    merged = dims["hidden"] * _merge(wrapper) ** 2
    return {**dims, "positions": dims["positions"] + 1, "merged": merged}


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    has_biases = _vision(wrapper)["norm_type"] == "layer_norm"
    norms = biased(*_NORMS) if has_biases else _NORMS
    attention = _FUSED if class_name(wrapper.config) == _CHAT else _APART
    return (*_OUTSIDE, *attention, *_BLOCK, *norms, *_PROJECTOR)


def _check(wrapper: Wrapper, dims: Dims) -> None:
    expected = "rms_norm" if (dims["hidden"], dims["layers"]) == _RMS_SIZE else "layer_norm"
    found = _vision(wrapper)["norm_type"]
    if found != expected:
        raise ArchitectureError(
            f"norm_type of the tower of {class_name(wrapper.config)} is {found!r}, but llama.cpp "
            f"computes one of {dims['layers']} layers of {dims['hidden']} with {expected}"
        )


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _vision(wrapper)
    tiles = {
        f"vision.preproc_{word}_tiles": u32(count)
        for word in ("min", "max")
        if (count := _tiles(wrapper, word)) is not None
    }
    return {
        **vision_keys(wrapper, dims, "internvl", number(config, "layer_norm_eps")),
        **activation_keys(config),
        "vision.projector.scale_factor": u32(_merge(wrapper)),
        **tiles,
    }


def _tiles(wrapper: Wrapper, word: str) -> int | None:
    """How many tiles an image is cut into, at least or at most."""
    key = f"{word}_dynamic_patch"
    found = wrapper.config.get(key, wrapper.processor.get(f"{word}_patches"))
    if not found:
        return None
    return integer({key: found, "architectures": wrapper.config["architectures"]}, key)


def _notes(wrapper: Wrapper) -> tuple[str, ...]:
    return (
        "llama.cpp gives each patch of an image the learned position of the one before it, since "
        "it puts the class token last; what the model sees differs a little from transformers'",
    )


INTERNVL = Tower(
    own=r"(vision_tower|multi_modal_projector)\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    check=_check,
    read_notes=_notes,
    renames=((r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."), *_CHAT_NAMES),
)
