"""The text model of Muse Glimmer: gated attention between norms, a window in most layers.

llama.cpp's "muse-glimmer". Embeddings are normed without weights; so are the heads of q and k, of
which q is then multiplied by ``qk_scale_factor``: GGUF holds both as norms with constant weights.
Other norms multiply by 1 + weight, but for the last. What attention gives is multiplied by a
sigmoid of its input. Layers with a sliding window are rotated, the others not. Logits are scaled
and soft-capped. ggml rotates neighbouring pairs, so the rows of q and k are interleaved.

Refused: several bases of the rotation, other epsilons of the norms after attention and MLP.
Sources: Meta's model card, transformers' modeling_muse_glimmer.py, llama.cpp's
src/models/muse-glimmer.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, number, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    layer,
)
from quantcli.archs.fold import Folds
from quantcli.archs.gemma2 import shift_norms
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule, Values
from quantcli.archs.windows import layer_kinds, window_config, window_keys
from quantcli.archs.wrappers import unwrapped
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, f32

_EVERY = 4
_FULL, _WINDOWED = "full_attention", "sliding_attention"
_ROTARY = {"attn_q": "heads", "attn_k": "kv_heads"}
_ATTENTION = (
    *(replace(rule, rotary=_ROTARY.get(rule.name.split(".")[2])) for rule in ATTENTION),
    layer("attn_gate.weight", "self_attn.gate_proj.weight", "q", "hidden"),
)
_NORMS = (
    NORMS[0],
    layer("post_attention_norm.weight", "post_attention_layernorm.weight", "hidden"),
    layer("ffn_norm.weight", "pre_feedforward_layernorm.weight", "hidden"),
    layer("post_ffw_norm.weight", "post_feedforward_layernorm.weight", "hidden"),
)
_NO_TOWER = {
    "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
}  # fmt: skip
"""Of a model without images: the class has a tower in any case."""


def _kinds(config: Config, layers: int) -> list[str]:
    usual = [_WINDOWED if (layers - 1 - i) % _EVERY else _FULL for i in range(layers)]
    return layer_kinds(config, layers, usual)


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, OUTPUT, *shift_norms(_NORMS), *_ATTENTION, *MLP)


def _values(config: Config, dims: Dims) -> Values:
    scale, size = positive(config, "qk_scale_factor"), dims["head_dim"]
    found = {}
    for index in range(dims["layers"]):
        found[f"blk.{index}.attn_q_norm.weight"] = np.full(size, scale, np.float32)
        found[f"blk.{index}.attn_k_norm.weight"] = np.ones(size, np.float32)
    return found


def _check(config: Config, dims: Dims) -> None:
    kinds = _kinds(config, dims["layers"])
    base = positive(read_rope(config, ("default",)), "rope_theta")
    bases = [base if kind == _WINDOWED else 0 for kind in kinds]
    if (config.get("layer_rope_theta") or bases) != bases:
        raise ArchitectureError(
            f"layer_rope_theta of {class_name(config)} in config.json is "
            f"{config['layer_rope_theta']!r}, but llama.cpp rotates the layers with a sliding "
            f"window by one base, {base:g} here, and no others"
        )
    if _WINDOWED not in kinds:
        raise ArchitectureError(
            f"config.json of {class_name(config)} gives no layer a sliding window, which llama.cpp "
            "expects"
        )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(read_rope(config, ("default",))),
        **window_keys(config, _kinds(config, dims["layers"])),
        "final_logit_softcapping": f32(positive(config, "final_logit_softcapping")),
        "logit_scale": f32(number(config, "output_multiplier")),
    }


def _config(header: Header) -> dict[str, Any]:
    text = decoder_config(header, "MuseGlimmerForConditionalGeneration", "muse_glimmer_text")
    scale = header.read("blk.0.attn_q_norm.weight").reshape(-1)[0]
    windows = window_config(header)
    base = text["rope_parameters"]["rope_theta"]
    return {
        "architectures": text.pop("architectures"),
        "model_type": "muse_glimmer",
        "text_config": {
            **text,
            **windows,
            "layer_rope_theta": [
                base if kind == _WINDOWED else 0 for kind in windows["layer_types"]
            ],
            **header.named(
                final_logit_softcapping="final_logit_softcapping", output_multiplier="logit_scale"
            ),
            "qk_scale_factor": float(str(scale)),
            "vocab_size": header.shapes["token_embd.weight"][0],
        },
        "vision_config": _NO_TOWER,
    }


MUSE_GLIMMER = unwrapped(
    Architecture(
        name="muse-glimmer",
        read_dims=attention_dims,
        read_rules=_rules,
        to_keys=_keys,
        to_config=_config,
        read_values=_values,
        check=_check,
        defaults={
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "sliding_window": 2048,
            "final_logit_softcapping": 20.0,
            "qk_scale_factor": 3.87,
            "output_multiplier": 0.19611613513818404,
        },
        fixed={
            "hidden_activation": ("silu", "swish"),
            "attention_bias": (False,),
            "tie_word_embeddings": (False,),
            "post_norm_eps": (1e-8,),
        },
        ignored=(r".*\.rotary_emb\.inv_freq",),
        folds=Folds(),
        published=((r"^model\.", "model.language_model."),),
    )
)
