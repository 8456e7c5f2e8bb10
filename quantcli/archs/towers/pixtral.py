"""Pixtral's tower: Pixtral, Mistral Small 3.x, Ministral 3; llama.cpp's "pixtral", "lightonocr".

RMSNorm, a gated MLP and a rotation in two dimensions, whose heads llama.cpp pairs as its text
models do. Mistral 3 merges squares of patches before it projects. A row of the text model's
embeddings is written as well: llama.cpp puts the token [IMG_BREAK] behind each row of an image
itself. LightOnOCR is Mistral 3's without it.

Refused: activations of the projector other than GELU, taps into several layers, rotations with
another base than 10000.
Sources: llama.cpp's tools/mtmd/models/pixtral.cpp, transformers' modeling_pixtral.py,
modeling_mistral3.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.config import check_fixed, class_name, integer
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import check_base, patches, tensor, vision_dims
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_EPSILON = 1e-5
"""Of the tower's norms, a constant in transformers."""
BREAK = "[IMG_BREAK]"
_BASE = 10000.0
_DEFAULTS = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
}  # fmt: skip
_EMBEDDINGS = "embed_tokens.weight"
_AT, _OF = "v.blk.{i}", "vision_tower.transformer.layers.{i}"
_ENCODER = (
    patches("vision_tower.patch_conv.weight"),
    tensor("v.pre_ln.weight", "vision_tower.ln_pre.weight", "hidden"),
    tensor(f"{_AT}.ln1.weight", f"{_OF}.attention_norm.weight", "hidden"),
    tensor(f"{_AT}.ln2.weight", f"{_OF}.ffn_norm.weight", "hidden"),
    *(
        replace(
            tensor(
                f"{_AT}.attn_{name}.weight", f"{_OF}.attention.{name}_proj.weight",
                "hidden", "hidden",
            ),
            rotary="heads" if name in "qk" else None,
        )
        for name in "qkv"
    ),
    tensor(f"{_AT}.attn_out.weight", f"{_OF}.attention.o_proj.weight", "hidden", "hidden"),
    tensor(f"{_AT}.ffn_gate.weight", f"{_OF}.feed_forward.gate_proj.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_up.weight", f"{_OF}.feed_forward.up_proj.weight", "ff", "hidden"),
    tensor(f"{_AT}.ffn_down.weight", f"{_OF}.feed_forward.down_proj.weight", "hidden", "ff"),
)  # fmt: skip
_PROJECTOR = (
    tensor("mm.1.weight", "multi_modal_projector.linear_1.weight", "width", "hidden"),
    tensor("mm.1.bias", "multi_modal_projector.linear_1.bias", "width", optional=True),
    tensor("mm.2.weight", "multi_modal_projector.linear_2.weight", "width", "width"),
    tensor("mm.2.bias", "multi_modal_projector.linear_2.bias", "width", optional=True),
)
_MERGER = (
    tensor("mm.input_norm.weight", "multi_modal_projector.norm.weight", "hidden"),
    tensor(
        "mm.patch_merger.weight",
        "multi_modal_projector.patch_merger.merging_layer.weight",
        "hidden",
        "merged",
    ),
)


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("vision_config", _DEFAULTS)
    check_fixed(
        {"projector_hidden_act": None, "vision_feature_layer": None, **wrapper.config},
        {"projector_hidden_act": ("gelu",), "vision_feature_layer": (-1,)},
    )
    check_base(config, _BASE)
    return config


def _merge(wrapper: Wrapper) -> int | None:
    """The side of the squares that are merged; None in Pixtral, which merges none."""
    if class_name(wrapper.config) == "LlavaForConditionalGeneration":
        return None
    return integer({"spatial_merge_size": 2, **wrapper.config}, "spatial_merge_size")


def _dims(wrapper: Wrapper) -> dict[str, int]:
    dims = vision_dims(wrapper, _vision(wrapper))
    text = {**wrapper.text, "architectures": wrapper.config["architectures"]}
    return {
        **dims,
        "merged": dims["hidden"] * (_merge(wrapper) or 1) ** 2,
        "vocab": integer(text, "vocab_size"),
    }


def _break_row(wrapper: Wrapper, vocab: int) -> Rule:
    number = wrapper.token(BREAK)
    if number >= vocab:
        raise ArchitectureError(f"the id {number} of {BREAK} is beyond the vocabulary of {vocab}")
    return replace(
        tensor("v.token_embd.img_break", _EMBEDDINGS, "width"),
        stored=("vocab", "width"),
        parts=(Part(("vocab", "width"), cut=((0, number, number + 1),)),),
    )


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    merger = () if _merge(wrapper) is None else _MERGER
    row = _break_row(wrapper, _dims(wrapper)["vocab"])
    return (*_ENCODER, *_PROJECTOR, *merger, row)


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    return _named_keys(wrapper, dims, "pixtral")


def _named_keys(wrapper: Wrapper, dims: Dims, projector: str) -> dict[str, MetaValue]:
    merge = _merge(wrapper)
    return {
        **vision_keys(wrapper, dims, projector, _EPSILON),
        **activation_keys(_vision(wrapper)),
        **({} if merge is None else {"vision.spatial_merge_size": u32(merge)}),
    }


def _lighton_keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    keys = _named_keys(wrapper, dims, "lightonocr")
    size = wrapper.processor.get("size")
    longest = size.get("longest_edge") if isinstance(size, dict) else None
    return keys | ({} if longest is None else {"vision.preproc_image_size": u32(longest)})


PIXTRAL = Tower(
    own=r"(vision_tower|multi_modal_projector)\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    renames=(
        (r"^(model\.)?(vision_tower|multi_modal_projector)\.", r"\2."),
        (r"^(model\.)?(language_model\.)?(model\.)?embed_tokens\.", "embed_tokens."),
    ),
    extra=(_EMBEDDINGS,),
)
LIGHTON_OCR = Tower(
    own=r"(vision_tower|multi_modal_projector)\.",
    read_dims=_dims,
    read_rules=lambda wrapper: (*_ENCODER, *_PROJECTOR, *_MERGER),
    to_keys=_lighton_keys,
    renames=(
        (r"^(model\.)?vision_(encoder|tower)\.", "vision_tower."),
        (r"^(model\.)?(vision_projection|multi_modal_projector)\.", "multi_modal_projector."),
    ),
)
