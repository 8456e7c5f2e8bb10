"""Step 3.5 Flash and the text model of Step 3.7: "step35".

Attention is gated head by head with a sigmoid of its input. Layers with a sliding window have other
head counts than the rest, whole heads rotated by a base of their own; of the others half a head is
rotated, slowed as in Llama 3.1, whose divisors become the tensor rope_freqs.weight. Norms multiply
by 1 + weight. The first layers have a dense MLP; a router's bias takes part in the choice of
experts, not in their gates. Gate and up are limited in some layers.

config.json spells many settings in two ways, by layer (``rope_theta``, ``partial_rotary_factors``,
``moe_layers_enum``, ``attention_other_setting``) or as transformers does. Experts are published
stacked, gate and up apart. Lists by layer also cover the blocks for multi-token prediction.

Sources: StepFun's model cards, transformers' modeling_step3p7.py, llama.cpp's
src/models/step35.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer, listing, number, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    MLP,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    expert_keys,
    gated_mlp,
    layer,
)
from quantcli.archs.fold import Folds
from quantcli.archs.gemma2 import shift_norms
from quantcli.archs.header import Header
from quantcli.archs.mixture import SIGMOID, placed
from quantcli.archs.mtp import Mtp, nextn_rules
from quantcli.archs.rope import Rope, llama3_factors, llama3_rope, read_layer_rope
from quantcli.archs.rules import Dims, Rule, Share, Values
from quantcli.archs.windows import PATTERN, layer_kinds, window_config, window_keys
from quantcli.archs.wrappers import unwrapped
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, boolean, f32, u32

_FULL, _WINDOWED = "full_attention", "sliding_attention"
_SHARE = {_FULL: 0.5, _WINDOWED: 1.0}
"""Of a head that is rotated; llama.cpp halves the one for the other."""
_LIMITS = {"swiglu_limits": "swiglu_clamp_exp", "swiglu_limits_shared": "swiglu_clamp_shexp"}
_DENSE_LAYERS = 3
_MOST = 8
"""Blocks for multi-token prediction."""

_GATE = layer("attn_gate.weight", "self_attn.g_proj.weight", "heads", "hidden")
_LAYER = (*NORMS, *ATTENTION, *HEAD_NORMS, _GATE)
_FUSED = "model.layers.{i}.mlp.experts.gate_up_proj"


def _stack(name: str, leaf: str, rows: str, columns: str, fused: Share | None = None) -> Rule:
    return replace(layer(name, f"moe.{leaf}.weight", "experts", rows, columns), fused=fused)


_EXPERTS = (
    layer("ffn_gate_inp.weight", "moe.gate.weight", "experts", "hidden"),
    layer("exp_probs_b.bias", "moe.router_bias", "experts"),
    _stack("ffn_gate_exps.weight", "gate_proj", "expert_ff", "hidden", Share(_FUSED, 0, 2)),
    _stack("ffn_up_exps.weight", "up_proj", "expert_ff", "hidden", Share(_FUSED, 1, 2)),
    _stack("ffn_down_exps.weight", "down_proj", "hidden", "expert_ff"),
    *gated_mlp("share_expert", "_shexp", "shared_ff"),
)
_RENAMES = (
    (r"\.mlp\.gate\.weight$", ".moe.gate.weight"),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".moe.router_bias"),
    (r"\.mlp\.experts\.down_proj$", ".moe.down_proj.weight"),
    (r"\.mlp\.shared_experts\.", ".share_expert."),
    (r"\.transformer\.shared_head\.output\.", ".shared_head.head."),
    (r"\.transformer\.", "."),
)
"""What transformers calls them, and what lies deeper in blocks behind the layers."""
_NO_TOWER = {
    "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
}  # fmt: skip
"""Of a model without images: the class has a tower in any case."""


def _kinds(config: Config, blocks: int = 0) -> list[str]:
    """Of the layers, and of so many ``blocks`` behind them."""
    layers = integer(config, "num_hidden_layers")
    count, found = layers + blocks, listing(config, "layer_types", str) or [_FULL] * layers
    behind = listing(config, "mtp_layer_types", str) or []
    kinds = [*found, *behind, *[_FULL] * count][:count]
    return layer_kinds({**config, "layer_types": kinds}, count, ())


def _sparse(config: Config, blocks: int = 0) -> list[int]:
    """The layers with experts, and the ``blocks`` behind them."""
    layers = integer(config, "num_hidden_layers")
    kinds, listed = listing(config, "mlp_layer_types", str), config.get("moe_layers_enum")
    if kinds is not None:
        kinds += listing(config, "mtp_mlp_layer_types", str) or []
        found = [index for index, kind in enumerate(kinds) if kind == "sparse"]
    elif listed is None:
        found = list(range(_DENSE_LAYERS, layers))
    else:
        items = listed.split(",") if isinstance(listed, str) else listed
        numbers = [str(item).strip() for item in items] if isinstance(items, list) else ["?"]
        numbers = [number for number in numbers if number]
        if not all(number.isdecimal() for number in numbers):
            raise ArchitectureError(
                f"moe_layers_enum of {class_name(config)} in config.json is {listed!r}, expected "
                "numbers of layers"
            )
        found = sorted(set(map(int, numbers)))
    return [index for index in found if index < layers + blocks]


def _heads(config: Config, kind: str) -> tuple[int, int]:
    """Attention heads and key-value heads of the layers of a ``kind``."""
    heads = integer(config, "num_attention_heads")
    groups = integer(config, "num_attention_groups", "num_key_value_heads")
    if kind == _FULL:
        return heads, groups
    other = config.get("attention_other_setting") or {}
    if not isinstance(other, Mapping):
        raise ArchitectureError(
            f"attention_other_setting of {class_name(config)} in config.json is not an object"
        )
    other = {**config, "num_attention_heads": heads, "num_attention_groups": groups, **other}
    return (
        integer(other, "num_sliding_attention_heads", "num_attention_heads"),
        integer(other, "num_attention_groups"),
    )


def _rope(config: Config, kind: str) -> Rope:
    kinds = _kinds(config)
    place = kinds.index(kind) if kind in kinds else 0
    single = dict(config)
    for key, name in (("rope_theta", "rope_theta"), ("partial_rotary_factors", "partial")):
        found = config.get(key)
        if isinstance(found, list):
            single[name] = found[place]
    types = ("default", "llama3") if kind == _FULL else ("default",)
    rope = dict(read_layer_rope(single, kind, "rope_theta", types))
    share = rope.get("partial_rotary_factor") or single.get("partial") or 1.0
    if share != _SHARE[kind]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} rotates {share!r} of a head in {kind}, but "
            f"llama.cpp {_SHARE[kind]}"
        )
    return {**rope, "rope_theta": positive(rope, "rope_theta")}


def _dims(config: Config) -> dict[str, int]:
    heads, groups = _heads(config, _FULL)
    return {
        **attention_dims({**config, "num_key_value_heads": groups}),
        "heads": heads,
        "experts": integer(config, "n_routed_experts", "moe_num_experts"),
        "expert_ff": integer(config, "moe_intermediate_size"),
        "shared_ff": integer(config, "share_expert_dim", "share_expert_dims"),
    }


def _layer_dims(config: Config, index: int) -> Dims:
    heads, groups = _heads(config, _kinds(config, _MOST)[index])
    size = integer(config, "head_dim")
    return {"heads": heads, "kv_heads": groups, "q": heads * size, "kv": groups * size}


def _rules(config: Config) -> tuple[Rule, ...]:
    sparse = _sparse(config)
    dense = [index for index in range(integer(config, "num_hidden_layers")) if index not in sparse]
    rules = (EMBEDDING, OUTPUT_NORM, OUTPUT, *_LAYER)
    return (*shift_norms(rules), *placed(MLP, dense), *placed(_EXPERTS, sparse))


def _behind(config: Config, blocks: range) -> tuple[Rule, ...]:
    sparse = _sparse(config, _MOST)
    return (
        *shift_norms(placed((*_LAYER, *nextn_rules(config)), blocks)),
        *placed(MLP, [block for block in blocks if block not in sparse]),
        *placed(_EXPERTS, [block for block in blocks if block in sparse]),
    )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    kinds = _kinds(config, dims["mtp"])
    counts = [_heads(config, kind) for kind in kinds]
    used = integer(config, "num_experts_per_tok", "moe_top_k")
    keys = {
        **decoder_keys(config, dims),
        "attention.head_count": array("i32", [heads for heads, _ in counts]),
        "attention.head_count_kv": array("i32", [groups for _, groups in counts]),
        "rope.freq_base": f32(_rope(config, _FULL)["rope_theta"]),
        "rope.freq_base_swa": f32(_rope(config, _WINDOWED)["rope_theta"]),
        "rope.dimension_count": u32(dims["head_dim"]),
        **window_keys(config, kinds),
        **expert_keys({**config, "num_experts_per_tok": used}, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "expert_shared_feed_forward_length": u32(dims["shared_ff"]),
        "expert_gating_func": u32(SIGMOID),
        "expert_weights_norm": boolean(True),
        "expert_weights_scale": f32(number(config, "moe_router_scaling_factor")),
        "leading_dense_block_count": u32(min(_sparse(config), default=dims["layers"])),
    }
    for ours, theirs in _LIMITS.items():
        listed = listing(config, ours, int, float, type(None))
        if listed:
            limits = [*listed, *[0] * len(kinds)][: len(kinds)]
            keys[theirs] = array("f32", [float(limit or 0) for limit in limits])
    return keys


def _values(config: Config, dims: Dims) -> Values:
    rope = _rope(config, _FULL)
    if rope["rope_type"] != "llama3":
        return {}
    half = dims["head_dim"] // 2
    found = np.ones(half, np.float32)
    found[: half // 2] = llama3_factors(rope, half)
    return {"rope_freqs.weight": found}


def _check(config: Config, dims: Dims) -> None:
    if _WINDOWED not in _kinds(config):
        raise ArchitectureError(
            f"config.json of {class_name(config)} gives no layer a sliding window, which llama.cpp "
            "expects"
        )
    size = number(config, "query_pre_attn_scalar", default=dims["head_dim"])
    if size != dims["head_dim"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} sets query_pre_attn_scalar to {size:g}, but "
            f"llama.cpp computes it with head_dim, {dims['head_dim']}, only"
        )


def _config(header: Header) -> dict[str, Any]:
    keys = header.keys
    text = decoder_config(header, "Step3p7ForConditionalGeneration", "step3p7")
    counts: Mapping[str, list[int]] = {
        name: [int(count) for count in keys.get(f"attention.{name}", ())]
        for name in ("head_count", "head_count_kv")
    }
    windows = window_config(header)
    kinds, behind = windows["layer_types"], header.behind.get(PATTERN, [])
    layers, dense = len(kinds), int(keys.get("leading_dense_block_count", 0))
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base")}
    if "rope_freqs.weight" in header.shapes:
        divisors = header.read("rope_freqs.weight").reshape(-1).astype(np.float64)
        full = llama3_rope(divisors[: len(divisors) // 2], keys["rope.freq_base"])
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa")}

    def of(kind: str, name: str) -> int:
        return counts[name][kinds.index(kind)] if kind in kinds else max(counts[name])

    return {
        "architectures": text.pop("architectures"),
        "model_type": text.pop("model_type"),
        "text_config": {
            **text,
            **windows,
            **header.named(
                n_routed_experts="expert_count",
                num_experts_per_tok="expert_used_count",
                moe_intermediate_size="expert_feed_forward_length",
                share_expert_dim="expert_shared_feed_forward_length",
                moe_router_scaling_factor="expert_weights_scale",
                **_LIMITS,
            ),
            "num_attention_heads": of(_FULL, "head_count"),
            "num_sliding_attention_heads": of(_WINDOWED, "head_count"),
            "num_key_value_heads": of(_FULL, "head_count_kv"),
            "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
            "mtp_layer_types": [_WINDOWED if windowed else _FULL for windowed in behind],
            "mtp_mlp_layer_types": [
                "sparse" if f"blk.{layers + k}.ffn_gate_inp.weight" in header.shapes else "dense"
                for k in range(len(behind))
            ],
            "rope_parameters": {
                _FULL: {**full, "partial_rotary_factor": 0.5},
                _WINDOWED: {**local, "partial_rotary_factor": 1.0},
            },
            "vocab_size": header.shapes["token_embd.weight"][0],
        },
        "vision_config": _NO_TOWER,
    }


STEP35 = unwrapped(
    Architecture(
        name="step35",
        read_dims=_dims,
        read_layer_dims=_layer_dims,
        read_rules=_rules,
        to_keys=_keys,
        to_config=_config,
        read_values=_values,
        check=_check,
        mtp=Mtp("num_nextn_predict_layers", "model.layers.{i}.eh_proj.weight", _behind, most=_MOST),
        defaults={
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "rope_theta": 10000.0,
            "moe_router_scaling_factor": 1.0,
        },
        fixed={
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "tie_word_embeddings": (False,),
            "use_head_wise_attn_gate": (True,),
            "use_moe_router_bias": (True,),
            "moe_router_activation": ("sigmoid",),
            "norm_expert_weight": (True,),
        },
        renames=_RENAMES,
        ignored=(r".*\.rotary_emb\.inv_freq", r"vit_large_projector\..*"),
        folds=Folds(),
        # transformers joins gate and up of the experts only where nothing is packed.
        loads_packed=False,
    )
)
