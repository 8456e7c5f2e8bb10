"""Trinity: gated attention between norms, experts with a shared one; llama.cpp's "afmoe".

What attention gives is multiplied by a sigmoid of its input. Each fourth layer attends to the whole
context and is not rotated, the others have a sliding window. Embeddings are multiplied by the root
of their size. The first layers have a dense MLP. A router's bias takes part in the choice of
experts, not in their gates, which are sigmoids divided by their sum.

Refused: embeddings without that scale, layers in another order.
Sources: Arcee's model cards, transformers' modeling_afmoe.py, llama.cpp's src/models/afmoe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, count, integer, number
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    MLP,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    expert_keys,
    experts,
    gated_mlp,
    layer,
    output,
)
from quantcli.archs.fold import Folds
from quantcli.archs.gemma2 import layer_pattern, refuse_pattern
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.windows import layer_kinds, window_config, window_keys
from quantcli.types import MetaValue, boolean, f32, u32

_EVERY = 4
_SIGMOID = 2
_NORMS = (
    NORMS[0],
    layer("post_attention_norm.weight", "post_attention_layernorm.weight", "hidden"),
    layer("ffn_norm.weight", "pre_mlp_layernorm.weight", "hidden"),
    layer("post_ffw_norm.weight", "post_mlp_layernorm.weight", "hidden"),
)
_GATE = layer("attn_gate.weight", "self_attn.gate_proj.weight", "q", "hidden")
_ROUTER, *_MATRICES = experts("mlp", "gate_proj", "up_proj", "down_proj")
_EXPERTS = (
    replace(_ROUTER, source="model.layers.{i}.mlp.router.gate.weight"),
    *_MATRICES,
    layer("exp_probs_b.bias", "mlp.expert_bias", "experts"),
)
_SHARED = gated_mlp("mlp.shared_experts", "_shexp", "shared_ff")


def _dense(config: Config) -> int:
    return min(count(config, "num_dense_layers", default=0), integer(config, "num_hidden_layers"))


def _dims(config: Config) -> dict[str, int]:
    width = integer(config, "moe_intermediate_size")
    return {
        **attention_dims(config),
        "experts": integer(config, "num_experts"),
        "expert_ff": width,
        "shared_ff": width * integer(config, "num_shared_experts"),
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    layers, dense = integer(config, "num_hidden_layers"), _dense(config)
    return (
        EMBEDDING, OUTPUT_NORM, output(config), *_NORMS, *ATTENTION, *HEAD_NORMS, _GATE,
        *(replace(rule, layers=range(dense)) for rule in MLP),
        *(replace(rule, layers=range(dense, layers)) for rule in (*_EXPERTS, *_SHARED)),
    )  # fmt: skip


def _kinds(config: Config, layers: int) -> list[str]:
    every = integer(config, "global_attn_every_n_layers")
    return layer_kinds(config, layers, layer_pattern(layers, every))


def _check(config: Config, dims: Dims) -> None:
    if _kinds(config, dims["layers"]) != layer_pattern(dims["layers"], _EVERY):
        raise refuse_pattern(config, _EVERY)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(read_rope(config, ("default", "linear", "yarn"))),
        "rope.dimension_count": u32(dims["head_dim"]),
        **window_keys(config, _kinds(config, dims["layers"])),
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "expert_shared_count": u32(dims["shared_ff"] // dims["expert_ff"]),
        "expert_gating_func": u32(_SIGMOID),
        "expert_weights_norm": boolean(True),
        "expert_weights_scale": f32(number(config, "route_scale")),
        "leading_dense_block_count": u32(_dense(config)),
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        **decoder_config(header, "AfmoeForCausalLM", "afmoe"),
        **window_config(header),
        **header.named(
            num_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            moe_intermediate_size="expert_feed_forward_length",
            num_shared_experts="expert_shared_count",
            num_dense_layers="leading_dense_block_count",
            route_scale="expert_weights_scale",
        ),
        "mup_enabled": True,
    }


AFMOE = Architecture(
    name="afmoe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "head_dim": 128,
        "num_dense_layers": 1,
        "num_shared_experts": 2,
        "global_attn_every_n_layers": _EVERY,
        "route_scale": 1.0,
        "mup_enabled": False,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mup_enabled": (True,),
        "score_func": ("sigmoid",),
        "route_norm": (True,),
        "num_expert_groups": (1,),
        "num_limited_groups": (1,),
        "n_group": (1,),
        "topk_group": (1,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=Folds(),
)
