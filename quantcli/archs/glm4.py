"""GLM-4 in transformers' form: gate above up, half of each head rotated by neighbouring values.

GLM-4 0414 and Z1 (norms before and after attention and MLP) are llama.cpp's "glm4", GLM-4 9B and
GLM-Edge its "chatglm". transformers rotates neighbours too, so no row moves.
Sources: arXiv:2406.12793, transformers' modeling_glm4.py and modeling_glm.py, llama.cpp's
src/models/glm4.cpp and chatglm.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture, no_check
from quantcli.archs.config import Config, flag
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    biased,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
    output,
    partial_config,
    partial_rotation,
)
from quantcli.archs.fold import DECODER, FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, u32

_POST_NORMS = (
    layer("post_attention_norm.weight", "post_self_attn_layernorm.weight", "hidden"),
    layer("post_ffw_norm.weight", "post_mlp_layernorm.weight", "hidden"),
)
_MLP = (
    layer("ffn_up.weight", "mlp.gate_up_proj.weight", "gate_up", "hidden"),
    layer("ffn_down.weight", "mlp.down_proj.weight", "hidden", "ff"),
)
_FOLDS = Folds(
    rules=(
        *(rule for rule in DECODER.rules if rule.kind != "gated"),
        FoldRule("gated", ("blk.{i}.ffn_up",), ("blk.{i}.ffn_down",), part="up"),
    ),
    writers=DECODER.writers,
    basis="",
)


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    return {**dims, "gate_up": 2 * dims["ff"]}


def _rope(config: Config) -> Rope:
    return read_rope(config, ("default", "yarn"), partial=True)


def _rules(config: Config) -> tuple[Rule, ...]:
    qkv = biased(*ATTENTION[:3]) if flag(config, "attention_bias") else ATTENTION[:3]
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *qkv, ATTENTION[3], *_MLP)


def _post_normed_rules(config: Config) -> tuple[Rule, ...]:
    return (*_rules(config), *_POST_NORMS)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(_rope(config)),
        "rope.dimension_count": u32(partial_rotation(_rope(config), dims)),
    }


def _config(header: Header) -> dict[str, Any]:
    normed = "blk.0.post_ffw_norm.weight" in header.shapes
    model = ("Glm4ForCausalLM", "glm4") if normed else ("GlmForCausalLM", "glm")
    config = decoder_config(header, *model)
    return {
        **config,
        "rope_parameters": partial_config(config, header),
        "attention_bias": "blk.0.attn_q.bias" in header.shapes,
    }


GLM = Architecture(
    name="chatglm",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
        "head_dim": 128,
        "attention_bias": True,
    },
    fixed={"hidden_act": ("silu", "swish")},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=_FOLDS,
)

GLM4 = replace(
    GLM,
    name="glm4",
    check=no_check,
    read_rules=_post_normed_rules,
    folds=replace(
        _FOLDS, basis="the norms after its attention and MLP weigh the stream's channels one by one"
    ),
)
