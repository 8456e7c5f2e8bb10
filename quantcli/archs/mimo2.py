"""MiMo-V2-Flash: experts, and a sliding window with sinks in most layers; llama.cpp's "mimo2".

Layers with a window have more key-value heads than the others, another base of the rotation, and a
sink in each head; a third of each head is rotated. Values have a size of their own, and what
attention gives is scaled. The first layer has a dense MLP. The published config.json says which
layers have a window as ``hybrid_layer_pattern``, and counts a window without the token itself
(``sliding_window_size``), as transformers does. Blocks for multi-token prediction are left out (a
note says so).

Sources: arXiv:2601.02780, transformers' modeling_mimo_v2_flash.py, llama.cpp's
src/models/mimo2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer, number, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    layer,
    partial_rotation,
)
from quantcli.archs.fold import Folds
from quantcli.archs.header import Header
from quantcli.archs.mixture import (
    SIGMOID,
    mixture_config,
    mixture_dims,
    mixture_keys,
    mixture_rules,
    placed,
)
from quantcli.archs.rope import Rope, read_layer_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.windows import layer_kinds, window_config, window_keys
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, f32, u32

_FULL, _WINDOWED = "full_attention", "sliding_attention"
_EVERY = 6
_ATTENTION = (
    *ATTENTION[:2],
    replace(ATTENTION[2], shape=("values", "hidden")),
    replace(ATTENTION[3], shape=("hidden", "out")),
)
_SINKS = layer("attn_sinks.weight", "self_attn.sinks", "heads")
_SHARE = 0.334
"""Of a head that is rotated."""


def _kinds(config: Config, layers: int) -> list[str]:
    hybrid = config.get("hybrid_layer_pattern")
    if isinstance(hybrid, list):
        usual = [_WINDOWED if windowed else _FULL for windowed in hybrid]
    else:
        usual = [_FULL if i == 0 or (i + 1) % _EVERY == 0 else _WINDOWED for i in range(layers)]
    return layer_kinds(config, layers, usual)


def _kv_heads(config: Config, kind: str) -> int:
    count = integer(config, "num_key_value_heads")
    if kind == _FULL:
        return count
    return integer(config, "swa_num_key_value_heads", default=2 * count)


def _rope(config: Config, kind: str) -> Rope:
    theta = "rope_theta" if kind == _FULL else "swa_rope_theta"
    rope = read_layer_rope(config, kind, theta, ("default",))
    if rope.get("partial_rotary_factor") is None:
        rope = {**rope, "partial_rotary_factor": _SHARE}
    return rope


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    value = integer(config, "v_head_dim")
    return {
        **dims,
        **mixture_dims(config),
        "value": value,
        "values": dims["kv_heads"] * value,
        "out": dims["heads"] * value,
    }


def _layer_dims(config: Config, index: int) -> Dims:
    kinds = _kinds(config, integer(config, "num_hidden_layers"))
    heads = _kv_heads(config, kinds[index])
    return {
        "kv_heads": heads,
        "kv": heads * integer(config, "head_dim"),
        "values": heads * integer(config, "v_head_dim"),
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    kinds = _kinds(config, integer(config, "num_hidden_layers"))
    windowed = [index for index, kind in enumerate(kinds) if kind == _WINDOWED]
    return (
        EMBEDDING, OUTPUT_NORM, OUTPUT, *NORMS, *_ATTENTION,
        *placed((_SINKS,), windowed), *mixture_rules(config),
    )  # fmt: skip


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    kinds = _kinds(config, dims["layers"])
    size = config.get("sliding_window_size")
    window = {**config, "sliding_window": size + 1} if isinstance(size, int) else config
    return {
        **decoder_keys(config, dims, epsilon=_epsilon(config)),
        "attention.head_count_kv": array("i32", [_kv_heads(config, kind) for kind in kinds]),
        "attention.value_length": u32(dims["value"]),
        "attention.value_scale": f32(number(config, "attention_value_scale", default=1.0)),
        **rope_keys(_rope(config, _FULL)),
        "rope.freq_base_swa": f32(positive(_rope(config, _WINDOWED), "rope_theta")),
        "rope.dimension_count": u32(partial_rotation(_rope(config, _FULL), dims)),
        **window_keys(window, kinds),
        **mixture_keys(config, dims, SIGMOID),
    }


def _epsilon(config: Config) -> str:
    return "rms_norm_eps" if config.get("rms_norm_eps") is not None else "layernorm_epsilon"


def _check(config: Config, dims: Dims) -> None:
    kinds, name = _kinds(config, dims["layers"]), class_name(config)
    if _WINDOWED not in kinds:
        raise ArchitectureError(
            f"config.json of {name} gives no layer a sliding window, which llama.cpp expects"
        )
    shares = {kind: partial_rotation(_rope(config, kind), dims) for kind in (_FULL, _WINDOWED)}
    if len(set(shares.values())) > 1:
        raise ArchitectureError(
            f"config.json of {name} rotates {shares[_FULL]} values of a head and, where there is a "
            f"sliding window, {shares[_WINDOWED]}, but llama.cpp as many in all layers"
        )
    for key, usual in {
        "swa_head_dim": dims["head_dim"],
        "swa_v_head_dim": dims["value"],
        "swa_num_attention_heads": dims["heads"],
    }.items():
        if integer(config, key, default=usual) != usual:
            raise ArchitectureError(
                f"config.json of {name} sets {key} to {config[key]}, but llama.cpp computes all "
                f"layers with {usual}"
            )


def _notes(config: Config) -> tuple[str, ...]:
    return (
        f"{class_name(config)} is published with blocks for multi-token prediction, which are left "
        "out",
    )


def _config(header: Header) -> dict[str, Any]:
    keys = header.keys
    config = decoder_config(header, "MiMoV2FlashForCausalLM", "mimo_v2_flash")
    heads = [int(count) for count in keys.get("attention.head_count_kv", ())]
    layers, dense = len(heads), int(keys.get("leading_dense_block_count", 0))
    share = keys.get("rope.dimension_count", 0) / max(1, int(config.get("head_dim", 1)))
    full = {**config["rope_parameters"], "partial_rotary_factor": share}
    local = {**full, "rope_theta": keys.get("rope.freq_base_swa", full["rope_theta"])}
    return {
        **config,
        **mixture_config(header),
        **window_config(header),
        **header.named(
            v_head_dim="attention.value_length",
            attention_value_scale="attention.value_scale",
        ),
        "num_key_value_heads": min(heads, default=0),
        "swa_num_key_value_heads": max(heads, default=0),
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        "rope_parameters": {_FULL: full, _WINDOWED: local},
    }


MIMO2 = Architecture(
    name="mimo2",
    read_dims=_dims,
    read_layer_dims=_layer_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    read_notes=_notes,
    defaults={
        "tie_word_embeddings": False,
        "head_dim": 192,
        "v_head_dim": 128,
        "rope_theta": 5000000.0,
        "swa_rope_theta": 10000.0,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
        "add_swa_attention_sink_bias": (True,),
        "add_full_attention_sink_bias": (False,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
        "routed_scaling_factor": (1.0,),
        "n_shared_experts": (0,),
        "attention_projection_layout": ("split",),
    },
    renames=((r"\.self_attn\.attention_sink_bias$", ".self_attn.sinks"),),
    ignored=(r".*\.rotary_emb\.inv_freq", r"model\.mtp\..*"),
    folds=Folds(),
)
