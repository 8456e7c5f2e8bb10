"""Laguna: gated attention whose head count differs by layer, experts with a shared one; "laguna".

What attention gives is multiplied by a softplus of its input, one value for each head or for each
channel. Layers with a sliding window may have other head counts and another rotation than the rest,
which YaRN may stretch. The first layers have a dense MLP. A router's bias takes part in the choice
of experts, not in their gates, which are sigmoids divided by their sum.

Refused: a soft cap on the router, weights on an expert's input.
Sources: poolside's model cards, transformers' modeling_laguna.py, llama.cpp's
src/models/laguna.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.cohere2_moe import dense_layers
from quantcli.archs.config import Config, class_name, integer, number, positive
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
    partial_rotation,
)
from quantcli.archs.fold import Folds
from quantcli.archs.header import Header
from quantcli.archs.rope import read_layer_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.windows import layer_kinds, window_config, window_keys
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, boolean, f32, u32

_SIGMOID = 2
_FULL, _WINDOWED = "full_attention", "sliding_attention"
_GATES = {"per-head": "heads", "per-element": "q"}
"""Rows of the attention's gate by ``gating``; true is the first."""

_GATE = layer("attn_gate.weight", "self_attn.g_proj.weight", "gate", "hidden")
_EXPERTS = (
    *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    layer("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", "experts"),
    *gated_mlp("mlp.shared_experts", "_shexp", "shared_ff"),
)


def _gating(config: Config) -> str:
    found = config.get("gating")
    listed = {str(kind).replace("_", "-") for kind in config.get("gating_types") or ()}
    kind = "per-head" if found is True else str(found).replace("_", "-")
    if kind not in _GATES or not listed <= {kind}:
        raise ArchitectureError(
            f"gating of {class_name(config)} in config.json is {found!r}, expected true or one of "
            f"{' and '.join(_GATES)} for all layers"
        )
    return kind


def _heads(config: Config, layers: int) -> list[int]:
    found = config.get("num_attention_heads_per_layer")
    if found is None:
        return [integer(config, "num_attention_heads")] * layers
    if (
        not isinstance(found, list)
        or len(found) != layers
        or not all(isinstance(heads, int) and heads > 0 for heads in found)
    ):
        raise ArchitectureError(
            f"num_attention_heads_per_layer of {class_name(config)} in config.json is {found!r}, "
            f"expected a count for each of {layers} layers"
        )
    return found


def _kinds(config: Config, layers: int) -> list[str]:
    return layer_kinds(config, layers, [_FULL] * layers)


def _dense(config: Config, layers: int) -> int:
    return 1 if config.get("mlp_layer_types") is None else dense_layers(config, layers)


def _dims(config: Config) -> dict[str, int]:
    return {
        **attention_dims(config),
        "experts": integer(config, "num_experts"),
        "expert_ff": integer(config, "moe_intermediate_size"),
        "shared_ff": integer(config, "shared_expert_intermediate_size"),
    }


def _layer_dims(config: Config, index: int) -> Dims:
    heads = _heads(config, integer(config, "num_hidden_layers"))
    own = {"heads": heads[index], "q": heads[index] * integer(config, "head_dim")}
    return {**own, "gate": own[_GATES[_gating(config)]]}


def _rules(config: Config) -> tuple[Rule, ...]:
    layers = integer(config, "num_hidden_layers")
    dense = _dense(config, layers)
    return (
        EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION, *HEAD_NORMS, _GATE,
        *(replace(rule, layers=range(dense)) for rule in MLP),
        *(replace(rule, layers=range(dense, layers)) for rule in _EXPERTS),
    )  # fmt: skip


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    full = read_layer_rope(config, _FULL, "rope_theta", ("default", "yarn"))
    keys = {
        **decoder_keys(config, dims),
        "attention.head_count": array("i32", _heads(config, dims["layers"])),
        **rope_keys(full),
        "rope.dimension_count": u32(partial_rotation(full, dims)),
        **window_keys(config, _kinds(config, dims["layers"])),
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "expert_shared_feed_forward_length": u32(dims["shared_ff"]),
        "expert_gating_func": u32(_SIGMOID),
        "expert_weights_norm": boolean(True),
        "expert_weights_scale": f32(number(config, "moe_routed_scaling_factor")),
        "leading_dense_block_count": u32(_dense(config, dims["layers"])),
    }
    if _WINDOWED in _kinds(config, dims["layers"]):
        local = read_layer_rope(config, _WINDOWED, "rope_theta", ("default",))
        keys["rope.freq_base_swa"] = f32(positive(local, "rope_theta"))
        keys["rope.dimension_count_swa"] = u32(partial_rotation(local, dims))
    return keys


def _check(config: Config, dims: Dims) -> None:
    _gating(config)
    kv_heads = dims["kv_heads"]
    if any(heads % kv_heads for heads in _heads(config, dims["layers"])):
        raise ArchitectureError(
            f"num_attention_heads_per_layer of {class_name(config)} in config.json has counts that "
            f"{kv_heads} key-value heads do not divide"
        )


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "LagunaForCausalLM", "laguna")
    heads = [int(count) for count in header.keys.get("attention.head_count", ())]
    gate = header.shapes.get("blk.0.attn_gate.weight", (0,))
    width = int(config.get("head_dim", 1))
    layers, dense = len(heads), int(header.keys.get("leading_dense_block_count", 0))
    full = config["rope_parameters"]
    local = {
        "rope_type": "default",
        "rope_theta": header.keys.get("rope.freq_base_swa", full["rope_theta"]),
        "partial_rotary_factor": header.keys.get("rope.dimension_count_swa", width) / width,
    }
    full["partial_rotary_factor"] = header.keys.get("rope.dimension_count", width) / width
    return {
        **config,
        **window_config(header),
        **header.named(
            num_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            moe_intermediate_size="expert_feed_forward_length",
            shared_expert_intermediate_size="expert_shared_feed_forward_length",
            moe_routed_scaling_factor="expert_weights_scale",
        ),
        "num_attention_heads": max(heads, default=0),
        "num_attention_heads_per_layer": heads,
        "gating": "per-head" if heads and gate[0] == heads[0] else "per-element",
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        "rope_parameters": {_FULL: full, _WINDOWED: local},
    }


LAGUNA = Architecture(
    name="laguna",
    read_dims=_dims,
    read_layer_dims=_layer_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "gating": True,
        "moe_routed_scaling_factor": 1.0,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "moe_router_logit_softcapping": (0.0,),
        "moe_apply_router_weight_on_input": (False,),
    },
    renames=(
        (r"\.mlp\.experts\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
    ),
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=Folds(),
)
