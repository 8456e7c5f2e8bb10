"""Gemma 4, the text model: dense, with experts, and the small E-models; llama.cpp's "gemma4".

Layers that look through a sliding window have heads of one size and number, those that look at the
whole context of another; in the large models the latter have no values of their own, their keys
are both. The last layers of an E-model have neither: they look at what the last layer of their kind
before them kept (keys and values that a checkpoint holds for them all the same are left out), and
each layer adds a share of embeddings that exist for it alone. In full layers the slowest
frequencies do not turn, which GGUF says by divisors that no frequency survives.

llama.cpp caps logits at 30 where a file does not say how; a model without a cap gets 0, which
turns it off there.

Refused: layer kinds in an order in which llama.cpp would look into the wrong layer, per-layer
embeddings of fewer tokens than there are, attention both ways.
Sources: transformers' modeling_gemma4.py, llama.cpp's src/models/gemma4.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, count, flag, integer, number, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    HEAD_NORMS,
    MLP,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    expert_keys,
    layer,
    output,
)
from quantcli.archs.gemma2 import LAYER_NORMS
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, read_layer_rope
from quantcli.archs.rules import Dims, Rule, Values
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, f32, u32

_FULL, _WINDOWED = "full_attention", "sliding_attention"
_WINDOW_EVERY = 6
_NEVER = np.float32(1e30)
"""Divides a frequency that does not turn; llama.cpp's converter writes the same."""

_SCALAR = replace(layer("layer_output_scale.weight", "layer_scalar", "one"), stored=(1,))
PER_LAYER = (
    Rule(
        "per_layer_token_embd.weight",
        "model.embed_tokens_per_layer.weight",
        ("vocab", "per_layer_all"),
    ),
    Rule(
        "per_layer_model_proj.weight",
        "model.per_layer_model_projection.weight",
        ("per_layer_all", "hidden"),
    ),
    Rule("per_layer_proj_norm.weight", "model.per_layer_projection_norm.weight", ("per_layer",)),
    layer("inp_gate.weight", "per_layer_input_gate.weight", "per_layer", "hidden"),
    layer("proj.weight", "per_layer_projection.weight", "hidden", "per_layer"),
    layer("post_norm.weight", "post_per_layer_input_norm.weight", "hidden"),
)
_EXPERTS = (
    layer("ffn_gate_inp.weight", "router.proj.weight", "experts", "hidden"),
    layer("ffn_gate_inp.scale", "router.scale", "hidden"),
    layer("ffn_gate_up_exps.weight", "experts.gate_up_proj", "experts", "expert_ff2", "hidden"),
    layer("ffn_down_exps.weight", "experts.down_proj", "experts", "hidden", "expert_ff"),
    layer("ffn_down_exps.scale", "router.per_expert_scale", "experts"),
    layer("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight", "hidden"),
    layer("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight", "hidden"),
    layer("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight", "hidden"),
)


def _kinds(config: Config) -> list[str]:
    """What each layer looks at; the last one at the whole context, whatever is said."""
    layers = integer(config, "num_hidden_layers")
    found = config.get("layer_types")
    if found is None:
        found = [_WINDOWED if (i + 1) % _WINDOW_EVERY else _FULL for i in range(layers)]
    if (
        not isinstance(found, list) or len(found) != layers
        or not set(found) <= {_FULL, _WINDOWED}
    ):  # fmt: skip
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json is {found!r}, expected one of "
            f"{_FULL} and {_WINDOWED} for each of {layers} layers"
        )
    return [*found[:-1], _FULL]


def _owners(config: Config) -> int:
    """How many layers, from the first on, have keys and values of their own."""
    layers = integer(config, "num_hidden_layers")
    shared = config.get("num_kv_shared_layers") or 0
    if not isinstance(shared, int) or not 0 <= shared < layers:
        raise ArchitectureError(
            f"num_kv_shared_layers of {class_name(config)} in config.json is {shared!r}, but it "
            f"has {layers} layers"
        )
    return layers - shared


def _heads(config: Config, kind: str) -> tuple[int, int]:
    """Size of a head and number of key-value heads in layers of that kind."""
    usual = {
        "head_dim": integer(config, "head_dim"),
        "num_key_value_heads": integer(config, "num_key_value_heads"),
    }
    special = config.get("per_layer_config")
    if special is None:
        if kind == _FULL:
            usual["head_dim"] = integer(config, "global_head_dim", default=512)
            if flag(config, "attention_k_eq_v"):
                usual["num_key_value_heads"] = integer(
                    config, "num_global_key_value_heads", default=usual["num_key_value_heads"]
                )
        return usual["head_dim"], usual["num_key_value_heads"]
    layers = [index for index, found in enumerate(_kinds(config)) if found == kind]
    if not _is_by_layer(special):
        raise ArchitectureError(
            f"per_layer_config of {class_name(config)} in config.json is {special!r}, expected an "
            "object of sizes for each layer"
        )
    found = {
        tuple(sorted({**usual, **special.get(str(index), {})}.items()))
        for index in layers or [-1]
    }  # fmt: skip
    sizes = dict(found.pop())
    if found or sizes.keys() != usual.keys():
        raise ArchitectureError(
            f"per_layer_config of {class_name(config)} in config.json gives {kind} layers "
            "different sizes, of which llama.cpp has one head_dim and num_key_value_heads"
        )
    return integer({**config, **sizes}, "head_dim"), integer(
        {**config, **sizes}, "num_key_value_heads"
    )


def _is_by_layer(found: object) -> bool:
    """Whether it is an object of objects of numbers."""
    return isinstance(found, Mapping) and all(
        isinstance(own, Mapping) and all(isinstance(size, int) for size in own.values())
        for own in found.values()
    )


def _dims(config: Config) -> dict[str, int]:
    windowed = attention_dims(config)
    head_dim, kv_heads = _heads(config, _FULL)
    full = attention_dims({**config, "head_dim": head_dim, "num_key_value_heads": kv_heads})
    per_layer = count(config, "hidden_size_per_layer_input", default=0)
    dims = {
        **windowed,
        "one": 1,
        "full_head_dim": full["head_dim"],
        "full_kv_heads": full["kv_heads"],
        "per_layer": per_layer,
        "per_layer_all": per_layer * windowed["layers"],
    }
    if flag(config, "enable_moe_block"):
        ff = integer(config, "moe_intermediate_size")
        dims |= {"experts": integer(config, "num_experts"), "expert_ff": ff, "expert_ff2": 2 * ff}
    return dims


def _layer_dims(config: Config, index: int) -> Dims:
    head_dim, kv_heads = _heads(config, _kinds(config)[index])
    wide = flag(config, "use_double_wide_mlp") and index >= _owners(config)
    return {
        "head_dim": head_dim,
        "q": integer(config, "num_attention_heads") * head_dim,
        "kv": kv_heads * head_dim,
        "ff": integer(config, "intermediate_size") * (2 if wide else 1),
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    owners = range(_owners(config))
    shared = flag(config, "attention_k_eq_v")
    valued = [i for i in owners if not shared or _kinds(config)[i] == _WINDOWED]
    query, key, value, out = ATTENTION
    query_norm, key_norm = HEAD_NORMS
    return (
        EMBEDDING, OUTPUT_NORM, output(config), *LAYER_NORMS, *MLP, _SCALAR,
        query, query_norm, out,
        replace(key, layers=owners), replace(key_norm, layers=owners),
        replace(value, layers=valued),
        *(PER_LAYER if config.get("hidden_size_per_layer_input") else ()),
        *(_EXPERTS if flag(config, "enable_moe_block") else ()),
    )  # fmt: skip


def _check(config: Config, dims: Dims) -> None:
    kinds, owners = _kinds(config), _owners(config)
    if config.get("use_bidirectional_attention") == "all":
        raise ArchitectureError(
            f"config.json sets use_bidirectional_attention to 'all', but llama.cpp computes "
            f"{class_name(config)} with attention to what came before only"
        )
    if _WINDOWED not in kinds:
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json has no {_WINDOWED}, and "
            "llama.cpp computes it with such layers only"
        )
    if owners < 2 or (owners < len(kinds) and kinds[owners - 2 : owners] != [_WINDOWED, _FULL]):
        raise ArchitectureError(
            f"num_kv_shared_layers of {class_name(config)} in config.json leaves keys and values "
            f"to layers of the kinds {', '.join(kinds[:owners])}, but llama.cpp looks into the "
            f"last two of them, which have to be {_WINDOWED} and {_FULL}"
        )
    per_layer = integer(config, "vocab_size_per_layer_input", default=dims["vocab"])
    if dims["per_layer"] and per_layer != dims["vocab"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has vocab_size {dims['vocab']} and "
            f"vocab_size_per_layer_input {per_layer}, but llama.cpp needs them to be equal"
        )


def _full_rope(config: Config) -> Rope:
    rope = read_layer_rope(config, _FULL, "rope_theta", ("proportional", "default"))
    if config.get("rope_parameters") is None:
        rope = {**rope, "rope_type": "proportional", "partial_rotary_factor": 0.25}
    return rope


def _values(config: Config, dims: Dims) -> Values:
    rope, half = _full_rope(config), dims["full_head_dim"] // 2
    turning, factor = half, 1.0
    if rope["rope_type"] == "proportional":
        share = number(rope, "partial_rotary_factor", default=1.0)
        turning = int(share * dims["full_head_dim"] // 2)
        factor = positive(rope, "factor", default=1.0)
        if not 0 < turning <= half:
            raise ArchitectureError(
                f"config.json sets partial_rotary_factor to {share:g}, which turns {turning} of "
                f"{half} frequencies of {class_name(config)}"
            )
    divisors = np.full(half, _NEVER, np.float32)
    divisors[:turning] = factor
    return {"rope_freqs.weight": divisors}


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    kinds, owners = _kinds(config), _owners(config)
    windowed = [kind == _WINDOWED for kind in kinds]
    local = read_layer_rope(config, _WINDOWED, "rope_local_base_freq", ("default",))
    keys = decoder_keys(config, dims)
    if flag(config, "use_double_wide_mlp") and owners < len(kinds):
        wide = [dims["ff"] * (1 if index < owners else 2) for index in range(len(kinds))]
        keys["feed_forward_length"] = array("i32", wide)
    if dims["full_kv_heads"] != dims["kv_heads"]:
        heads = [dims["kv_heads"] if kind else dims["full_kv_heads"] for kind in windowed]
        keys["attention.head_count_kv"] = array("i32", heads)
    for name, size in (("key", dims["head_dim"]), ("value", dims["head_dim"])):
        keys[f"attention.{name}_length"] = u32(dims["full_head_dim"])
        keys[f"attention.{name}_length_swa"] = u32(size)
    if "experts" in dims:
        moe = {**config, "num_experts_per_tok": config.get("top_k_experts")}
        keys |= expert_keys(moe, dims)
        keys["expert_feed_forward_length"] = u32(dims["expert_ff"])
    return {
        **keys,
        "attention.shared_kv_layers": u32(len(kinds) - owners),
        "attention.sliding_window": u32(integer(config, "sliding_window")),
        "attention.sliding_window_pattern": array("bool", windowed),
        "embedding_length_per_layer_input": u32(dims["per_layer"]),
        "final_logit_softcapping": f32(number(config, "final_logit_softcapping", default=0.0)),
        "rope.dimension_count": u32(dims["full_head_dim"]),
        "rope.dimension_count_swa": u32(dims["head_dim"]),
        "rope.freq_base": f32(positive(_full_rope(config), "rope_theta")),
        "rope.freq_base_swa": f32(positive(local, "rope_theta")),
    }


def _config(header: Header) -> dict[str, Any]:
    keys = header.keys
    config = decoder_config(header, "Gemma4ForCausalLM", "gemma4_text")
    pattern = list(keys.get("attention.sliding_window_pattern", []))
    full = [index for index, windowed in enumerate(pattern) if not windowed]
    owners = len(pattern) - int(keys.get("attention.shared_kv_layers", 0))
    widths, heads = config.get("intermediate_size"), config.get("num_key_value_heads")
    layer_heads = heads if isinstance(heads, list) else [heads] * len(pattern)
    per_layer = {
        str(index): {
            "head_dim": config.get("head_dim"), "num_key_value_heads": layer_heads[index]
        }
        for index in full
    }  # fmt: skip
    wide = isinstance(widths, list) and widths[-1] == 2 * widths[0]
    keys_are_values = any(
        index < owners and f"blk.{index}.attn_v.weight" not in header.shapes for index in full
    )
    return {
        **config,
        **header.named(
            head_dim="attention.key_length_swa",
            sliding_window="attention.sliding_window",
            num_kv_shared_layers="attention.shared_kv_layers",
            hidden_size_per_layer_input="embedding_length_per_layer_input",
            num_experts="expert_count",
            top_k_experts="expert_used_count",
            moe_intermediate_size="expert_feed_forward_length",
        ),
        "intermediate_size": widths[0] if isinstance(widths, list) else widths,
        "num_key_value_heads": next(
            (count for count, windowed in zip(layer_heads, pattern, strict=False) if windowed),
            layer_heads[0] if layer_heads else None,
        ),
        "use_double_wide_mlp": wide,
        "attention_k_eq_v": keys_are_values,
        "enable_moe_block": "expert_count" in keys,
        "per_layer_config": per_layer,
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0) or None,
        "vocab_size_per_layer_input": header.shapes["token_embd.weight"][0],
        "layer_types": [_WINDOWED if windowed else _FULL for windowed in pattern],
        "rope_parameters": {
            _FULL: _proportional(header, config["rope_parameters"]),
            _WINDOWED: {
                "rope_type": "default",
                "rope_theta": keys.get("rope.freq_base_swa", 10000.0),
            },
        },
    }


def _proportional(header: Header, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The full layers' rotation, by the divisors of its frequencies."""
    divisors = header.read("rope_freqs.weight").reshape(-1)
    turning = int((divisors < _NEVER).sum())
    factor = float(divisors[0])
    if not turning or (divisors[:turning] != factor).any():
        raise ArchitectureError(
            "rope_freqs.weight does not hold the divisors of Gemma 4's proportional rotation",
            hint="--config names a folder with the model's config.json",
        )
    return {
        "rope_type": "proportional",
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": turning / len(divisors),
        **({"factor": factor} if factor != 1 else {}),
    }


GEMMA4 = Architecture(
    name="gemma4",
    read_dims=_dims,
    read_layer_dims=_layer_dims,
    read_rules=_rules,
    read_values=_values,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "tie_word_embeddings": True,
    },
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
    },
    ignored=(
        r".*\.rotary_emb\.\w*inv_freq",
        r"model\.layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm)\.weight",
    ),
)

GEMMA4_UNIFIED = replace(
    GEMMA4,
    defaults={
        **GEMMA4.defaults,
        "max_position_embeddings": 262144,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
    },
)
"""The text model of the class whose images need no tower; it has no per-layer embeddings."""
