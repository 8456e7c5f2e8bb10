"""Cohere's North: Command-R7B with a mixture of experts; llama.cpp's "cohere2moe".

Attention and MLP stand side by side behind one norm, which is a LayerNorm unless config.json gives
``rms_norm_eps``. The first layers may have a dense MLP; they are rotated even where they attend to
the whole context, other layers only where they have a sliding window. Gates are a softmax over the
chosen experts or a sigmoid; a shared expert is averaged with them.

Sources: transformers' modeling_cohere2_moe.py, llama.cpp's src/models/cohere2moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, count, flag, integer, listing, number
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    EPSILON,
    NORMS,
    OUTPUT_NORM,
    RMS_EPSILON,
    attention_dims,
    decoder_config,
    decoder_keys,
    expert_keys,
    experts,
    gated_mlp,
    output,
)
from quantcli.archs.fold import Folds
from quantcli.archs.gemma2 import layer_pattern
from quantcli.archs.header import Header
from quantcli.archs.mtp import Mtp, behind, nextn_rules
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.windows import layer_kinds, window_config, window_keys
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, boolean, f32, text, u32

_GATES = {"softmax": 1, "sigmoid": 2}
"""LLAMA_EXPERT_GATING_FUNC_TYPE_* by expert_selection_fn."""

_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj")
_DENSE = gated_mlp("mlp", size="dense_ff")
_SHARED = gated_mlp("mlp.shared_experts", "_shexp", "shared_ff")


def dense_layers(config: Config, layers: int) -> int:
    """How many layers come first that have a dense MLP, before all that have experts."""
    kinds = listing(config, "mlp_layer_types", str, length=layers)
    if kinds is None:
        return count(config, "first_k_dense_replace", default=0)
    dense = len([kind for kind in kinds if kind == "dense"])
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ArchitectureError(
            f"mlp_layer_types of {class_name(config)} in config.json is {kinds!r}, but llama.cpp "
            "computes dense layers before all layers with experts only"
        )
    return dense


def _kinds(config: Config, layers: int, dense: int) -> list[str]:
    every = integer(config, "prefix_dense_sliding_window_pattern")
    rest = layer_pattern(layers - dense, integer(config, "sliding_window_pattern"))
    return layer_kinds(config, layers, [*layer_pattern(dense, every), *rest])


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    shared = count(config, "num_shared_experts", default=0)
    return {
        **dims,
        "experts": integer(config, "num_experts"),
        "expert_ff": dims["ff"],
        "dense_ff": integer(config, "prefix_dense_intermediate_size", default=dims["ff"]),
        "shared_ff": shared * dims["ff"],
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    layers = integer(config, "num_hidden_layers")
    dense = dense_layers(config, layers)
    sparse = (*_EXPERTS, *(_SHARED if config.get("num_shared_experts") else ()))
    return (
        EMBEDDING, OUTPUT_NORM, output(config), NORMS[0], *ATTENTION,
        *(replace(rule, layers=range(dense)) for rule in _DENSE),
        *(replace(rule, layers=range(dense, layers)) for rule in sparse),
    )  # fmt: skip


def _behind(config: Config, blocks: range) -> tuple[Rule, ...]:
    shared = _SHARED if config.get("num_shared_experts") else ()
    return behind(blocks, NORMS[0], *ATTENTION, *_EXPERTS, *shared, *nextn_rules(config))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    dense = dense_layers(config, dims["layers"])
    gate = config.get("expert_selection_fn") or "softmax"
    rms = config.get("rms_norm_eps") is not None
    norm = ("rms_norm_eps", RMS_EPSILON) if rms else ("layer_norm_eps", EPSILON)
    # A block behind the layers attends to the whole context.
    kinds = [*_kinds(config, dims["layers"], dense), *["full_attention"] * dims["mtp"]]
    keys = {
        **decoder_keys(config, {**dims, "ff": dims["dense_ff"]}, epsilon=norm[0], key=norm[1]),
        **rope_keys(read_rope(config, ("default",))),
        "rope.scaling.type": text("none"),
        "rope.dimension_count": u32(dims["head_dim"]),
        "logit_scale": f32(number(config, "logit_scale")),
        **window_keys(config, kinds),
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "leading_dense_block_count": u32(dense),
        "expert_gating_func": u32(_GATES[gate]),
        # Gates by a softmax over the chosen experts are those over all, normalised.
        "expert_weights_norm": boolean(gate == "softmax" or flag(config, "norm_topk_prob")),
    }
    if dims["shared_ff"]:
        keys["expert_shared_count"] = u32(dims["shared_ff"] // dims["ff"])
        keys["expert_shared_feed_forward_length"] = u32(dims["shared_ff"])
    return keys


def _check(config: Config, dims: Dims) -> None:
    dense = dense_layers(config, dims["layers"])
    if dense >= dims["layers"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has no layer with experts, which llama.cpp needs"
        )
    if not window_keys(config, _kinds(config, dims["layers"], dense)):
        raise ArchitectureError(
            f"config.json of {class_name(config)} gives no layer a sliding window, which llama.cpp "
            "expects"
        )


def _config(header: Header) -> dict[str, Any]:
    keys = header.keys
    norm = ("rms_norm_eps", RMS_EPSILON) if RMS_EPSILON in keys else ("layer_norm_eps", EPSILON)
    config = decoder_config(
        header, "Cohere2MoeForCausalLM", "cohere2_moe", epsilon=norm[0], key=norm[1]
    )
    gates = {value: name for name, value in _GATES.items()}
    dense, layers = keys.get("leading_dense_block_count", 0), int(keys.get("block_count", 0))
    return {
        **config,
        **header.named(
            prefix_dense_intermediate_size="feed_forward_length",
            intermediate_size="expert_feed_forward_length",
            num_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            logit_scale="logit_scale",
            norm_topk_prob="expert_weights_norm",
        ),
        "num_shared_experts": keys.get("expert_shared_count", 0),
        "expert_selection_fn": gates.get(keys.get("expert_gating_func", 2)),
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        **window_config(header),
    }


COHERE2_MOE = Architecture(
    name="cohere2moe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "head_dim": 128,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "prefix_dense_sliding_window_pattern": 1,
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "prefix_dense_sliding_window_pattern": (1,),
        "shared_expert_combination_strategy": ("average",),
        "expert_selection_fn": tuple(_GATES),
    },
    # Norms are stored with biases that are zero.
    ignored=(r".*\.rotary_emb\.inv_freq", r".*layernorm\.bias", r"model\.norm\.bias"),
    mtp=Mtp("num_nextn_predict_layers", "model.layers.{i}.eh_proj.weight", _behind, most=1),
    folds=Folds(),
)
