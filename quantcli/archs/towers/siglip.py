"""SigLIP towers: Gemma 3, SmolVLM and Idefics3, LFM2-VL; llama.cpp's "gemma3", "idefics3", "lfm2".

One vision transformer, three ways to make fewer tokens of its patches: Gemma 3 averages squares of
them and norms the result, the others put squares of them side by side and project.

Sources: llama.cpp's tools/mtmd/models/siglip.cpp, transformers' modeling_siglip.py,
modeling_gemma3.py, modeling_idefics3.py, modeling_lfm2_vl.py.
"""

from __future__ import annotations

from dataclasses import replace

from quantcli.archs.config import class_name, integer, number
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import (
    block,
    patches,
    refuse_swapped,
    tensor,
    vision_dims,
)
from quantcli.errors import ArchitectureError
from quantcli.pieces import Add
from quantcli.types import MetaValue, u32

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_SMOLVLM = {**_DEFAULTS, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
POOLING_HEAD = r"vision_tower\.head\..*"
_TOWER = r"^(model\.)?vision_(tower|model)\.(vision_model\.)?"
RENAMES = (
    (_TOWER, "vision_tower."),
    (r"^model\.(multi_modal_projector|connector)\.", r"\1."),
)
ENCODER = (
    *block("v", "vision_tower.encoder.layers"),
    *biased(
        tensor("v.post_ln.weight", "vision_tower.post_layernorm.weight", "hidden"),
    ),
    tensor("v.patch_embd.bias", "vision_tower.embeddings.patch_embedding.bias", "hidden"),
    tensor(
        "v.position_embd.weight",
        "vision_tower.embeddings.position_embedding.weight",
        "positions",
        "hidden",
    ),
)
"""SigLIP but for the patches' convolution, which has two layouts."""
_PATCHES = patches("vision_tower.embeddings.patch_embedding.weight")
_OWN = r"(vision_tower|multi_modal_projector|connector)\."


def _gemma3_dims(wrapper: Wrapper) -> dict[str, int]:
    return vision_dims(wrapper, wrapper.section("vision_config", _DEFAULTS))


def _gemma3_rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    return (
        *ENCODER,
        _PATCHES,
        tensor(
            "mm.input_projection.weight",
            "multi_modal_projector.mm_input_projection_weight",
            "hidden",
            "width",
        ),
        replace(
            tensor(
                "mm.soft_emb_norm.weight", "multi_modal_projector.mm_soft_emb_norm.weight", "hidden"
            ),
            pointwise=Add(1.0),
        ),
    )


def _gemma3_keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = wrapper.section("vision_config", _DEFAULTS)
    keys = vision_keys(wrapper, dims, "gemma3", number(config, "layer_norm_eps"))
    keys |= activation_keys(config)
    across = dims["image"] // dims["patch"]
    tokens = integer({"mm_tokens_per_image": 256, **wrapper.config}, "mm_tokens_per_image")
    kept = round(tokens**0.5)
    if kept * kept != tokens or across % kept:
        raise ArchitectureError(
            f"mm_tokens_per_image {tokens} of {class_name(wrapper.config)} does not divide its "
            f"{across}×{across} patches into squares"
        )
    if across // kept != 4:
        keys["vision.projector.scale_factor"] = u32(across // kept)
    return keys


GEMMA3 = Tower(
    own=_OWN,
    read_dims=_gemma3_dims,
    read_rules=_gemma3_rules,
    to_keys=_gemma3_keys,
    check=refuse_swapped,
    renames=RENAMES,
    ignored=(POOLING_HEAD,),
)


def _idefics3_dims(wrapper: Wrapper) -> dict[str, int]:
    dims = vision_dims(wrapper, wrapper.section("vision_config", _SMOLVLM))
    return {**dims, "merged": dims["hidden"] * _scale(wrapper, "scale_factor") ** 2}


def _scale(wrapper: Wrapper, key: str) -> int:
    return integer({key: 2, **wrapper.config}, key)


def _idefics3_keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = wrapper.section("vision_config", _SMOLVLM)
    size = wrapper.processor.get("size")
    longest = size.get("longest_edge") if isinstance(size, dict) else None
    return {
        **vision_keys(wrapper, dims, "idefics3", number(config, "layer_norm_eps")),
        **activation_keys(config),
        "vision.projector.scale_factor": u32(_scale(wrapper, "scale_factor")),
        "vision.preproc_image_size": u32(longest or dims["image"]),
    }


def _idefics3_rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    projection = "connector.modality_projection.proj.weight"
    return (*ENCODER, _PATCHES, tensor("mm.model.fc.weight", projection, "width", "merged"))


IDEFICS3 = Tower(
    own=_OWN,
    read_dims=_idefics3_dims,
    read_rules=_idefics3_rules,
    to_keys=_idefics3_keys,
    check=refuse_swapped,
    renames=RENAMES,
)
