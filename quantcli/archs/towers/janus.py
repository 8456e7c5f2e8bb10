"""The eyes of Janus and Janus-Pro: SigLIP and an MLP; llama.cpp's "janus_pro".

What draws images (an image tokenizer and its heads) is left out, as in llama.cpp.

Refused: a projector deeper than two matrices, which llama.cpp's graph has, and normed heads.
Sources: llama.cpp's tools/mtmd/models/siglip.cpp, transformers' modeling_janus.py.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.config import check_fixed, integer, number
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import block, patches, tensor, vision_dims
from quantcli.types import MetaValue

_DEFAULTS = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 384,
    "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "mlp_ratio": 4.0, "depth": 2,
    "use_qk_norm": False, "attention_bias": True,
}  # fmt: skip
_FIXED = {"depth": (2,), "use_qk_norm": (False,), "attention_bias": (True,)}
_EMBEDDINGS = "vision_model.embeddings"
_RULES = (
    *block("v", "vision_model.encoder.layers", out="projection_layer"),
    patches(f"{_EMBEDDINGS}.patch_embedding.weight"),
    tensor("v.patch_embd.bias", f"{_EMBEDDINGS}.patch_embedding.bias", "hidden"),
    tensor(
        "v.position_embd.weight", f"{_EMBEDDINGS}.position_embedding.weight", "positions", "hidden"
    ),
    *biased(
        tensor("v.post_ln.weight", "vision_model.post_layernorm.weight", "hidden"),
        tensor("mm.0.weight", "aligner.fc1.weight", "width", "hidden"),
        tensor("mm.1.weight", "aligner.hidden_layers.0.weight", "width", "width"),
    ),
)


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("vision_config", _DEFAULTS)
    check_fixed(config, _FIXED)
    width = integer(config, "hidden_size") * number(config, "mlp_ratio")
    return {**config, "intermediate_size": int(width)}


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    return _RULES


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _vision(wrapper)
    return {
        **vision_keys(wrapper, dims, "janus_pro", number(config, "layer_norm_eps")),
        **activation_keys(config),
    }


JANUS = Tower(
    own=r"(vision_model|aligner)\.",
    read_dims=lambda wrapper: vision_dims(wrapper, _vision(wrapper)),
    read_rules=_rules,
    to_keys=_keys,
    renames=((r"^model\.(vision_model|aligner)\.", r"\1."),),
)
