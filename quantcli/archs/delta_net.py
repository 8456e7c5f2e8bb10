"""What Qwen3-Next, Qwen3.5 and Qwen3.6 share: gated delta nets, and attention in some layers.

A delta net keeps a matrix of state per value head, which decays, forgets along its key and learns
the new value; several value heads share a key. Attention's queries come with a gate of their size.
Norms multiply by 1 + weight, but for the one over a value head. llama.cpp marks the layers without
attention in a list of truth values, one for each block.

Behind the last layer these models have a block for multi-token prediction, of which llama.cpp runs
one.

Refused: models in which all layers are of one kind, at which llama.cpp aborts; heads of keys and
values that differ in size, and another epsilon than 1e-6, which
llama.cpp takes for the length of keys as well, where transformers has 1e-6.
Sources: Gated DeltaNet (arXiv:2412.06464), transformers' modeling_qwen3_next.py and
modeling_qwen3_5.py, llama.cpp's src/models/qwen3next.cpp and qwen35.cpp, conversion/qwen.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    experts,
    layer,
    output,
    partial_config,
    partial_rotation,
)
from quantcli.archs.fold import GATED, VALUES, FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.mtp import Mtp, behind
from quantcli.archs.qwen2_moe import SHARED_EXPERT
from quantcli.archs.rope import Rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.pieces import Add
from quantcli.types import MetaValue, array, u32

ROPE_TYPES = ("default", "linear", "yarn")
DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "rms_norm_eps": (1e-6,),
    "mtp_use_dedicated_embeddings": (False,),
}
RENAMES = ((r"^model\.mtp\.", "mtp."),)
_KINDS = ("linear_attention", "full_attention")
_MTP = "mtp.layers.0."

_LAYER = (
    NORMS[0],
    replace(NORMS[1], name="blk.{i}.post_attention_norm.weight"),
)
_ATTENTION = (
    replace(ATTENTION[0], shape=("gated_q", "hidden")),
    *ATTENTION[1:],
    *HEAD_NORMS,
)
DELTA_NET = (
    layer("ssm_norm.weight", "linear_attn.norm.weight", "state"),
    layer("ssm_out.weight", "linear_attn.out_proj.weight", "hidden", "value"),
)
EXPERTS = (*experts("mlp", "gate_proj", "up_proj", "down_proj"), *SHARED_EXPERT)

_NORMED = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_ba",
)  # fmt: skip
_NORMED_MLP = (
    "ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps",
    "ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp",
)  # fmt: skip
FOLDS = Folds(
    rules=(
        FoldRule("norm", ("blk.{i}.attn_norm",), tuple(f"blk.{{i}}.{name}" for name in _NORMED)),
        FoldRule(
            "norm",
            ("blk.{i}.post_attention_norm",),
            tuple(f"blk.{{i}}.{name}" for name in _NORMED_MLP),
        ),
        VALUES,
        GATED,
        FoldRule("gated", ("blk.{i}.ffn_up_exps",), ("blk.{i}.ffn_down_exps",)),
        FoldRule("gated", ("blk.{i}.ffn_up_shexp",), ("blk.{i}.ffn_down_shexp",)),
    ),
    basis="its block for multi-token prediction reads what the head reads, behind the final norm",
    apart=("blk.{i}.ssm_conv1d", "blk.{i}.ssm_out", "blk.{i}.nextn.eh_proj"),
)


def mixer_dims(config: Config) -> dict[str, int]:
    """Sizes of attention and delta net; of a mixture, those of its experts too."""
    ff = config.get("intermediate_size", config.get("moe_intermediate_size"))
    dims = attention_dims({**config, "intermediate_size": ff})
    key_heads = integer(config, "linear_num_key_heads")
    value_heads = integer(config, "linear_num_value_heads")
    state = integer(config, "linear_key_head_dim")
    if integer(config, "linear_value_head_dim") != state or value_heads % key_heads:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {key_heads} key heads of {state} and "
            f"{value_heads} value heads of {config['linear_value_head_dim']} in its delta nets, "
            "but llama.cpp needs one size and a multiple"
        )
    sizes = {
        "gated_q": 2 * dims["q"],
        "kernel": integer(config, "linear_conv_kernel_dim"),
        "state": state,
        "key_heads": key_heads,
        "value_heads": value_heads,
        "sharers": value_heads // key_heads,
        "key": key_heads * state,
        "keys": 2 * key_heads * state,
        "value": value_heads * state,
        "qkv": (2 * key_heads + value_heads) * state,
    }
    if "num_experts" in config:
        sizes["experts"] = integer(config, "num_experts")
        sizes["expert_ff"] = integer(config, "moe_intermediate_size")
        sizes["shared_ff"] = integer(config, "shared_expert_intermediate_size")
    return {**dims, **sizes}


def rules(
    config: Config, delta_net: Sequence[Rule], feed_forward: Sequence[Rule]
) -> tuple[Rule, ...]:
    """Everything, given what a layer's delta net and its MLP are made of."""
    kinds = _kinds(config)
    without, within = (
        [index for index, found in enumerate(kinds) if found == kind] for kind in _KINDS
    )
    return _centred(
        EMBEDDING, OUTPUT_NORM, output(config), *_LAYER, *feed_forward,
        *(replace(rule, layers=within) for rule in _ATTENTION),
        *(replace(rule, layers=without) for rule in delta_net),
    )  # fmt: skip


def mtp(feed_forward: Sequence[Rule]) -> Mtp:
    """The block behind the last layer: one with attention, and how it begins and ends."""

    def read_rules(config: Config, blocks: range) -> tuple[Rule, ...]:
        hidden = integer(config, "hidden_size")
        own = (
            Rule("blk.{i}.nextn.eh_proj.weight", "mtp.fc.weight", (hidden, 2 * hidden)),
            Rule("blk.{i}.nextn.enorm.weight", "mtp.pre_fc_norm_embedding.weight", (hidden,)),
            Rule("blk.{i}.nextn.hnorm.weight", "mtp.pre_fc_norm_hidden.weight", (hidden,)),
            Rule("blk.{i}.nextn.shared_head_norm.weight", "mtp.norm.weight", (hidden,)),
        )
        inner = map(_inside_mtp, (*_LAYER, *_ATTENTION, *feed_forward))
        return behind(blocks, *_centred(*own, *inner))

    return Mtp("mtp_num_hidden_layers", "mtp.fc.weight", read_rules, most=1)


def _inside_mtp(rule: Rule) -> Rule:
    def moved(source: str) -> str:
        return source.replace("model.layers.{i}.", _MTP)

    fused = rule.fused and replace(rule.fused, source=moved(rule.fused.source))
    return replace(rule, source=moved(rule.source), fused=fused)


def _centred(*found: Rule) -> tuple[Rule, ...]:
    """The rules with 1 added to norms, which are stored around 0, except over a value head."""
    return tuple(
        replace(rule, pointwise=Add(1.0))
        if rule.name.endswith("norm.weight") and "ssm_norm" not in rule.name
        else rule
        for rule in found
    )


def keys(config: Config, dims: Dims, rope: Rope) -> dict[str, MetaValue]:
    """The key-values that all of them have, given the rotation."""
    recurrent = [kind == _KINDS[0] for kind in _kinds(config)]
    return {
        **decoder_keys({**config, "intermediate_size": dims["ff"]}, dims),
        **rope_keys(rope),
        "rope.dimension_count": u32(partial_rotation(rope, dims)),
        "ssm.conv_kernel": u32(dims["kernel"]),
        "ssm.state_size": u32(dims["state"]),
        "ssm.group_count": u32(dims["key_heads"]),
        "ssm.time_step_rank": u32(dims["value_heads"]),
        "ssm.inner_size": u32(dims["value"]),
        "attention.recurrent_layers": array("bool", recurrent + [False] * dims["mtp"]),
        "full_attention_interval": u32(integer(config, "full_attention_interval")),
    }


def rebuilt(header: Header, model: str, model_type: str) -> dict[str, Any]:
    """`keys` read backwards; files without the list of layers have attention at an interval."""
    found = header.keys
    config = decoder_config(header, model, model_type)
    config["rope_parameters"] = partial_config(config, header)
    interval = int(found.get("full_attention_interval", 4))
    recurrent = found.get("attention.recurrent_layers")
    if recurrent is None:
        recurrent = [(i + 1) % interval > 0 for i in range(int(found.get("block_count", 0)))]
    value_heads = int(found.get("ssm.time_step_rank", 0))
    return {
        **config,
        **header.named(
            linear_conv_kernel_dim="ssm.conv_kernel",
            linear_key_head_dim="ssm.state_size",
            linear_num_key_heads="ssm.group_count",
            linear_num_value_heads="ssm.time_step_rank",
        ),
        "linear_value_head_dim": int(found.get("ssm.inner_size", 0)) // max(1, value_heads),
        "layer_types": [_KINDS[0] if each else _KINDS[1] for each in recurrent],
        "full_attention_interval": interval,
    }


def rebuilt_experts(header: Header) -> dict[str, Any]:
    """The experts' part of a configuration."""
    return header.named(
        num_experts="expert_count",
        num_experts_per_tok="expert_used_count",
        moe_intermediate_size="expert_feed_forward_length",
        shared_expert_intermediate_size="expert_shared_feed_forward_length",
    )


def _kinds(config: Config) -> list[str]:
    """What each layer has, a delta net or attention."""
    layers = integer(config, "num_hidden_layers")
    found = config.get("layer_types")
    if found is None:
        interval = integer(config, "full_attention_interval")
        found = [_KINDS[0] if (index + 1) % interval else _KINDS[1] for index in range(layers)]
    if not isinstance(found, list) or len(found) != layers or not set(found) <= set(_KINDS):
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json is {found!r}, expected one of "
            f"{' and '.join(_KINDS)} for each of {layers} layers"
        )
    if set(found) != set(_KINDS):
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {layers} layers of {found[0]} "
            "(num_hidden_layers, layer_types), but llama.cpp runs it with layers of both kinds only"
        )
    return found
