"""Nemotron-H and Nemotron 3: Mamba-2, attention without positions and MLPs in layers of their own.

llama.cpp's "nemotron_h", or "nemotron_h_moe" where the MLPs are experts (Nemotron 3 Nano and
Super), which may work on a shortened stream and stand beside one that every token visits. Which
kind a layer is shows in GGUF's lists of key-value heads and widths: neither is a mixer. The MLPs
square their positive half and have no gate. Published files call the decoder "backbone". The block
for multi-token prediction is one of attention and experts in GGUF, and two layers where it is
stored.

transformers lifts time steps to ``time_step_min``, NVIDIA's own code and llama.cpp do not.
Refused: biases, groups of experts, dense MLPs beside experts, and limits of time steps.
Sources: NVIDIA's model cards, transformers' modeling_nemotron_h.py, llama.cpp's
src/models/nemotron-h.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, flag, integer, listing, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EPSILON,
    RMS_EPSILON,
    attention_dims,
    decoder_keys,
    expert_keys,
    layer,
    output,
)
from quantcli.archs.fold import VALUES, FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.mamba_mixer import STEP_LIMITS, mamba2, mamba2_dims, mamba2_keys
from quantcli.archs.mtp import Mtp, behind
from quantcli.archs.rules import Dims, Rule, Share
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, boolean, f32, u32

_MIXER, _ATTENTION, _MLP, _EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
_LETTERS = {"M": _MIXER, "*": _ATTENTION, "-": _MLP, "E": _EXPERTS}
_KINDS = {
    **{kind: kind for kind in _LETTERS.values()},
    "mamba": _MIXER,
    "attention": _ATTENTION,
}
_MAMBA = {
    "conv_kernel": "ssm.conv_kernel",
    "ssm_state_size": "ssm.state_size",
    "mamba_num_heads": "ssm.time_step_rank",
    "n_groups": "ssm.group_count",
}
_LAYER = "model.layers.{i}."
_OLDER = {"n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv"}
"""Spellings of older files, which transformers prefers."""

_ROTARY = {"attn_q": "heads", "attn_k": "kv_heads"}
_ATTENTION_RULES = tuple(
    replace(
        rule,
        source=rule.source.replace("self_attn", "mixer"),
        rotary=_ROTARY.get(rule.name.split(".")[2]),
    )
    for rule in ATTENTION
)
"""Rows of q and k are interleaved as by llama.cpp's converter, though nothing rotates them."""

_MLP_RULES = (
    layer("ffn_up.weight", "mixer.up_proj.weight", "ff", "hidden"),
    layer("ffn_down.weight", "mixer.down_proj.weight", "hidden", "ff"),
)


def _stack(name: str, matrix: str, *shape: str) -> Rule:
    rule = layer(name, f"mixer.experts.{{e}}.{matrix}.weight", "experts", *shape)
    return replace(rule, fused=Share(f"model.layers.{{i}}.mixer.experts.{matrix}"))


_EXPERT_RULES = (
    layer("ffn_gate_inp.weight", "mixer.gate.weight", "experts", "hidden"),
    layer("exp_probs_b.bias", "mixer.gate.e_score_correction_bias", "experts"),
    _stack("ffn_up_exps.weight", "up_proj", "expert_ff", "latent"),
    _stack("ffn_down_exps.weight", "down_proj", "latent", "expert_ff"),
    layer("ffn_up_shexp.weight", "mixer.shared_experts.up_proj.weight", "shared_ff", "hidden"),
    layer("ffn_down_shexp.weight", "mixer.shared_experts.down_proj.weight", "hidden", "shared_ff"),
)
_LATENT_RULES = (
    layer("ffn_latent_down.weight", "mixer.fc1_latent_proj.weight", "latent", "hidden"),
    layer("ffn_latent_up.weight", "mixer.fc2_latent_proj.weight", "hidden", "latent"),
)


def _kinds(config: Config) -> list[str]:
    """What each layer is."""
    found = listing(config, "layers_block_type", str) or listing(config, "layer_types", str)
    pattern = config.get("hybrid_override_pattern")
    if found is None and isinstance(pattern, str):
        found = [_LETTERS.get(letter, letter) for letter in pattern]
    if not isinstance(found, list) or not found or not set(found) <= set(_KINDS):
        raise ArchitectureError(
            f"layers_block_type of {class_name(config)} in config.json is {found!r}, expected a "
            f"list of {', '.join(_LETTERS.values())}"
        )
    return [_KINDS[kind] for kind in found]


def _layers(config: Config, kind: str) -> tuple[int, ...]:
    return tuple(index for index, found in enumerate(_kinds(config)) if found == kind)


def _has_experts(config: Config) -> bool:
    return _EXPERTS in _kinds(config)


def _dims(config: Config) -> dict[str, int]:
    older = {new: config[old] for new, old in _OLDER.items() if config.get(old) is not None}
    config = {**config, **older, "num_hidden_layers": len(_kinds(config))}
    dims = attention_dims(config)
    inner = integer(config, "mamba_num_heads") * integer(config, "mamba_head_dim")
    dims |= mamba2_dims(config, dims["hidden"], inner, _MAMBA)
    if _has_experts(config):
        dims["experts"] = integer(config, "n_routed_experts")
        dims["expert_ff"] = integer(config, "moe_intermediate_size")
        dims["shared_ff"] = integer(config, "moe_shared_expert_intermediate_size")
        dims["latent"] = integer(config, "moe_latent_size", default=dims["hidden"])
    return dims


def _expert_rules(config: Config) -> tuple[Rule, ...]:
    latent = config.get("moe_latent_size") is not None
    return (*_EXPERT_RULES, *(_LATENT_RULES if latent else ()))


def _rules(config: Config) -> tuple[Rule, ...]:
    parts = (
        (_ATTENTION, _ATTENTION_RULES),
        (_MLP, _MLP_RULES),
        (_EXPERTS, _expert_rules(config)),
    )
    return (
        Rule("token_embd.weight", "model.embeddings.weight", ("vocab", "hidden")),
        Rule("output_norm.weight", "model.norm_f.weight", ("hidden",)),
        output(config),
        layer("attn_norm.weight", "norm.weight", "hidden"),
        *mamba2("model.layers.{i}.mixer", _layers(config, _MIXER)),
        *(
            replace(rule, layers=_layers(config, kind))
            for kind, rules in parts
            for rule in rules
        ),
    )  # fmt: skip


def _block_rules(config: Config, blocks: range) -> tuple[Rule, ...]:
    """The block behind the last layer: attention and experts, stored as two layers."""
    hidden = integer(config, "hidden_size")
    first, second = "mtp.layers.0.", "mtp.layers.1."

    def inside(rules: Iterable[Rule], layer: str) -> Iterator[Rule]:
        for rule in rules:
            fused = rule.fused
            if fused is not None:
                fused = replace(fused, source=fused.source.replace(_LAYER, layer))
            yield replace(rule, source=rule.source.replace(_LAYER, layer), fused=fused)

    return behind(
        blocks,
        Rule("blk.{i}.nextn.eh_proj.weight", f"{first}eh_proj.weight", (hidden, 2 * hidden)),
        Rule("blk.{i}.nextn.enorm.weight", f"{first}enorm.weight", (hidden,)),
        Rule("blk.{i}.nextn.hnorm.weight", f"{first}hnorm.weight", (hidden,)),
        Rule("blk.{i}.attn_norm.weight", f"{first}norm.weight", (hidden,)),
        *inside(_ATTENTION_RULES, first),
        Rule("blk.{i}.post_attention_norm.weight", f"{second}norm.weight", (hidden,)),
        *inside(_expert_rules(config), second),
        Rule("blk.{i}.nextn.shared_head_norm.weight", f"{second}final_layernorm.weight", (hidden,)),
    )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    kinds = _kinds(config)
    width = dims["expert_ff" if _has_experts(config) else "ff"]
    behind_width, behind_heads = [width] * dims["mtp"], [dims["kv_heads"]] * dims["mtp"]
    found = {
        **decoder_keys(config, dims, epsilon="layer_norm_epsilon"),
        EPSILON: f32(positive(config, "layer_norm_epsilon")),
        **mamba2_keys(dims),
        "rope.scaling.finetuned": boolean(False),
        "feed_forward_length": array(
            "i32",
            [width if kind in (_MLP, _EXPERTS) else 0 for kind in kinds] + behind_width,
        ),
        "attention.head_count_kv": array(
            "i32",
            [dims["kv_heads"] if kind == _ATTENTION else 0 for kind in kinds] + behind_heads,
        ),
    }
    if not _has_experts(config):
        return found
    if config.get("moe_latent_size") is not None:
        found["moe_latent_size"] = u32(dims["latent"])
    return {
        **found,
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "expert_shared_feed_forward_length": u32(dims["shared_ff"]),
        "expert_shared_count": u32(integer(config, "n_shared_experts")),
        "expert_group_count": u32(1),
        "expert_group_used_count": u32(1),
        "expert_weights_norm": boolean(flag(config, "norm_topk_prob")),
        "expert_weights_scale": f32(positive(config, "routed_scaling_factor")),
    }


def _config(header: Header) -> dict[str, Any]:
    keys = header.keys
    layers = keys.get("block_count", 0)
    widths = keys.get("feed_forward_length", [0] * layers)
    heads = keys.get("attention.head_count_kv", [0] * layers)
    wide = _EXPERTS if keys.get("expert_count") else _MLP
    found = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "layers_block_type": [
            _ATTENTION if count else wide if width else _MIXER
            for count, width in zip(heads, widths, strict=True)
        ],
        "num_key_value_heads": max(heads, default=0),
        **header.named(
            hidden_size="embedding_length",
            max_position_embeddings="context_length",
            num_attention_heads="attention.head_count",
            head_dim="attention.key_length",
            layer_norm_epsilon=RMS_EPSILON,
            n_routed_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            moe_intermediate_size="expert_feed_forward_length",
            moe_shared_expert_intermediate_size="expert_shared_feed_forward_length",
            n_shared_experts="expert_shared_count",
            norm_topk_prob="expert_weights_norm",
            routed_scaling_factor="expert_weights_scale",
            moe_latent_size="moe_latent_size",
            **_MAMBA,
        ),
    }
    if max(widths, default=0):
        found["intermediate_size"] = max(widths)
    inner, count = keys.get("ssm.inner_size"), keys.get("ssm.time_step_rank")
    return {**found, "mamba_head_dim": inner // count} if inner and count else found


def _check(config: Config, dims: Dims) -> None:
    if {_MLP, _EXPERTS} <= set(_kinds(config)):
        raise ArchitectureError(
            f"config.json of {class_name(config)} has layers of kind {_MLP} and of kind "
            f"{_EXPERTS}, but llama.cpp takes one of the two for all"
        )


def _notes(config: Config) -> tuple[str, ...]:
    least = config.get("time_step_min")
    if not isinstance(least, float) or least < _NO_STEP or _MIXER not in _kinds(config):
        return ()
    return (
        f"transformers lifts time steps below time_step_min {least:g} to it; llama.cpp, like "
        "NVIDIA's own code, does not",
    )


_NO_STEP = 1e-9
"""Steps below this change nothing in float32."""

_FOLDS = Folds(
    rules=(
        FoldRule(
            "norm",
            ("blk.{i}.attn_norm",),
            (
                "blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v", "blk.{i}.ssm_in",
                "blk.{i}.ffn_up", "blk.{i}.ffn_gate_inp", "blk.{i}.ffn_up_shexp",
                "blk.{i}.ffn_latent_down|blk.{i}.ffn_up_exps",
            ),
        ),
        VALUES,
        FoldRule("norm", ("output_norm",), ("output",)),
    ),
    writers=(
        "token_embd", "blk.{i}.attn_output", "blk.{i}.ssm_out", "blk.{i}.ffn_down",
        "blk.{i}.ffn_down_shexp", "blk.{i}.ffn_latent_up|blk.{i}.ffn_down_exps",
    ),
    basis="",
    apart=tuple(
        f"blk.{{i}}.{name}"
        for name in (
            "ffn_down", "ffn_down_exps", "ffn_down_shexp", "ffn_latent_up", "ssm_conv1d", "ssm_out",
        )
    ),
)  # fmt: skip

_DENSE = Architecture(
    name="nemotron_h",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    read_notes=_notes,
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 21504,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "time_step_min": 0.001,
    },
    fixed={
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_bias": (False,),
        "mamba_proj_bias": (False,),
        "use_conv_bias": (True,),
        "n_group": (1,),
        "topk_group": (1,),
        "time_step_limit": STEP_LIMITS,
        "sliding_window": (),
    },
    renames=((r"^backbone\.", "model."),),
    folds=_FOLDS,
    published=((r"^model\.", "backbone."),),
)
_MIXTURE = replace(
    _DENSE,
    name="nemotron_h_moe",
    mtp=Mtp("num_nextn_predict_layers", "mtp.layers.0.eh_proj.weight", _block_rules, most=1),
)
NEMOTRON_H = replace(_DENSE, others=((_has_experts, _MIXTURE),))
