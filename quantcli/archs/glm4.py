"""GLM-4 in transformers' form: gate above up, half of each head rotated by neighbouring values.

GLM-4 0414 and Z1 (norms before and after attention and MLP) are llama.cpp's "glm4", GLM-4 9B and
GLM-Edge its "chatglm". transformers rotates neighbours too, so no row moves, unless the rotation is
shared out among time, height and width (GLM-4.1V), where ggml rotates halves: then the even values
of q and k come before the odd ones, also where they are not rotated, which their product does not
see. GLM-OCR is the same with a block for multi-token prediction.
Sources: arXiv:2406.12793, transformers' modeling_glm4.py and modeling_glm.py, llama.cpp's
src/models/glm4.cpp and chatglm.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture, no_check
from quantcli.archs.config import Config, class_name, flag
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
from quantcli.archs.mtp import Mtp, behind, nextn_rules
from quantcli.archs.rope import Rope, read_rope, rope_keys, section_config, section_keys
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.archs.wrappers import unwrapped
from quantcli.errors import ArchitectureError
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


def _shared_rope(config: Config) -> Rope:
    return read_rope(config, ("default", "mrope", "yarn"), partial=True, sections=True)


def _turned(rule: Rule) -> Rule:
    """Even before odd values in each head of q and k."""
    size = {"attn_q": "heads", "attn_k": "kv_heads"}.get(rule.name.split(".")[-2])
    if size is None:
        return rule
    part = Part((size, "chunks", "pairs", 2), (0, 1, 3, 2))
    if len(rule.shape) > 1:
        part = Part((*part.view, "hidden"), (*part.axes, 4))
    return replace(rule, parts=(part,))


def _rules(config: Config) -> tuple[Rule, ...]:
    qkv = biased(*ATTENTION[:3]) if flag(config, "attention_bias") else ATTENTION[:3]
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *qkv, ATTENTION[3], *_MLP)


def _post_normed_dims(config: Config) -> dict[str, int]:
    dims = _dims(config)
    rotated = partial_rotation(_shared_rope(config), dims)
    return {**dims, "pairs": rotated // 2, "chunks": dims["head_dim"] // rotated}


def _post_normed_rules(config: Config) -> tuple[Rule, ...]:
    rules = (*_rules(config), *_POST_NORMS)
    shares = "mrope_section" in _shared_rope(config)
    return tuple(map(_turned, rules)) if shares else rules


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(_rope(config)),
        "rope.dimension_count": u32(partial_rotation(_rope(config), dims)),
    }


def _post_normed_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = _shared_rope(config)
    keys = {
        **decoder_keys(config, dims),
        **rope_keys({**rope, "rope_type": rope["rope_type"].replace("mrope", "default")}),
        "rope.dimension_count": u32(2 * dims["pairs"]),
    }
    if "mrope_section" not in rope:
        return keys
    if dims["head_dim"] % (2 * dims["pairs"]):
        raise ArchitectureError(
            f"config.json rotates {2 * dims['pairs']} of the {dims['head_dim']} values of a head "
            f"of {class_name(config)}, expected one half or another whole part"
        )
    return {**keys, **section_keys(rope, dims["pairs"])}


def _config(header: Header) -> dict[str, Any]:
    normed = "blk.0.post_ffw_norm.weight" in header.shapes
    model = ("Glm4ForCausalLM", "glm4") if normed else ("GlmForCausalLM", "glm")
    config = decoder_config(header, *model)
    return {
        **config,
        "rope_parameters": partial_config(config, header) | section_config(header),
        "attention_bias": "blk.0.attn_q.bias" in header.shapes,
    }


def _behind(config: Config, blocks: range) -> tuple[Rule, ...]:
    layered = (rule for rule in _post_normed_rules(config) if "{i}" in rule.name)
    return behind(blocks, *layered, *nextn_rules(config))


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
    read_dims=_post_normed_dims,
    read_rules=_post_normed_rules,
    to_keys=_post_normed_keys,
    mtp=Mtp("num_nextn_predict_layers", "model.layers.{i}.eh_proj.weight", _behind),
    folds=replace(
        _FOLDS, basis="the norms after its attention and MLP weigh the stream's channels one by one"
    ),
)


GLM4V = replace(
    unwrapped(GLM4),
    defaults={
        **{key: value for key, value in GLM.defaults.items() if key != "head_dim"},
        "rms_norm_eps": 1e-5,
    },
)

GLM_OCR = replace(GLM4V, defaults={**GLM4V.defaults, "attention_bias": False})
