"""Llama 4: Scout and Maverick, a shared expert and one of many; llama.cpp's "llama4".

Experts are stored stacked and transposed, gate beside up. In Maverick every second layer has a
dense MLP, whose size is called ``intermediate_size_mlp``. Every fourth layer is not rotated and
attends to the whole context, its queries sharpened with the logarithm of their position; the others
attend in chunks of 8192 tokens, which llama.cpp takes for granted. So it does with the norms on q
and k, which it leaves out of models with 128 experts. Neighbouring values are rotated in
transformers too, so no row moves.

Sources: Meta's model card, transformers' modeling_llama4.py, llama.cpp's src/models/llama4.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, flag, integer, listing
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    expert_keys,
    gated_mlp,
    layer,
    output,
)
from quantcli.archs.fold import Folds
from quantcli.archs.header import Header
from quantcli.archs.rope import llama3_factors, llama3_rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Part, Rule, Values
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_ROPE_TYPES = ("default", "llama3")
_CHUNK = 8192
_UNROTATED = 4
_UNNORMED = 128
"""The number of experts by which llama.cpp tells the model whose q and k have no norms."""

_WIDE = ("experts", "hidden", 2, "expert_ff")


def _half(name: str, index: int) -> Rule:
    part = Part(_WIDE, (0, 2, 3, 1), ((2, index, index + 1),))
    rule = layer(name, "feed_forward.experts.gate_up_proj", "experts", "expert_ff", "hidden")
    return replace(rule, stored=("experts", "hidden", "gate_up"), parts=(part,))


_EXPERTS = (
    layer("ffn_gate_inp.weight", "feed_forward.router.weight", "experts", "hidden"),
    _half("ffn_gate_exps.weight", 0),
    _half("ffn_up_exps.weight", 1),
    replace(
        layer(
            "ffn_down_exps.weight", "feed_forward.experts.down_proj",
            "experts", "hidden", "expert_ff",
        ),
        stored=("experts", "expert_ff", "hidden"),
        parts=(Part(("experts", "expert_ff", "hidden"), (0, 2, 1)),),
    ),
)  # fmt: skip


_SHARED = gated_mlp("feed_forward.shared_expert", "_shexp", "expert_ff")
_DENSE = gated_mlp("feed_forward")


def _sparse(config: Config, layers: int) -> tuple[int, ...]:
    """The layers with experts."""
    step = integer(config, "interleave_moe_layer_step")
    expected = tuple(range(step - 1, layers, step))
    found = listing(config, "moe_layers", int)
    if found is not None and tuple(found) != expected:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has experts in the layers {found!r}, but "
            f"llama.cpp expects them in every one, or every interleave_moe_layer_step-th"
        )
    return expected


def _dims(config: Config) -> dict[str, int]:
    size = integer(config, "intermediate_size")
    dense = integer(config, "intermediate_size_mlp", default=size)
    return {
        **attention_dims({**config, "intermediate_size": dense}),
        "experts": integer(config, "num_local_experts"),
        "expert_ff": size,
        "gate_up": 2 * size,
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    layers = integer(config, "num_hidden_layers")
    sparse = _sparse(config, layers)
    dense = tuple(index for index in range(layers) if index not in sparse)
    return (
        EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION,
        *(replace(rule, layers=sparse) for rule in (*_EXPERTS, *_SHARED)),
        *(replace(rule, layers=dense) for rule in _DENSE),
    )  # fmt: skip


def _check(config: Config, dims: Dims) -> None:
    layers, name = dims["layers"], class_name(config)
    _sparse(config, layers)
    rotated = [int((index + 1) % _UNROTATED != 0) for index in range(layers)]
    if (config.get("no_rope_layers") or rotated) != rotated:
        raise ArchitectureError(
            f"no_rope_layers of {name} in config.json is {config['no_rope_layers']!r}, but "
            f"llama.cpp leaves every {_UNROTATED}th layer unrotated"
        )
    kinds = ["chunked_attention" if each else "full_attention" for each in rotated]
    if (config.get("layer_types") or kinds) != kinds:
        raise ArchitectureError(
            f"layer_types of {name} in config.json is {config['layer_types']!r}, but llama.cpp "
            f"lets every {_UNROTATED}th layer attend to the whole context, and no other"
        )
    normed = dims["experts"] != _UNNORMED
    if flag(config, "use_qk_norm") != normed:
        raise ArchitectureError(
            f"config.json of {name} sets use_qk_norm to {flag(config, 'use_qk_norm')} with "
            f"{dims['experts']} experts; llama.cpp leaves the norms out with {_UNNORMED} experts, "
            "and only then"
        )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        "rope.dimension_count": u32(dims["head_dim"]),
        **rope_keys(read_rope(config, _ROPE_TYPES)),
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "interleave_moe_layer_step": u32(integer(config, "interleave_moe_layer_step")),
    }


def _values(config: Config, dims: Dims) -> Values:
    rope = read_rope(config, _ROPE_TYPES)
    if rope["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(rope, dims["head_dim"])}


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "Llama4ForCausalLM", "llama4_text")
    if "rope_freqs.weight" in header.shapes:
        divisors = header.read("rope_freqs.weight").reshape(-1).astype(np.float64)
        config["rope_parameters"] = llama3_rope(divisors, config["rope_parameters"]["rope_theta"])
    return {
        **config,
        **header.named(
            intermediate_size_mlp="feed_forward_length",
            intermediate_size="expert_feed_forward_length",
            num_local_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            interleave_moe_layer_step="interleave_moe_layer_step",
        ),
        "use_qk_norm": header.keys.get("expert_count") != _UNNORMED,
    }


LLAMA4 = Architecture(
    name="llama4",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    read_values=_values,
    check=_check,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "attention_chunk_size": (_CHUNK,),
        "floor_scale": (_CHUNK,),
        "attn_scale": (0.1,),
        # Published files say 4 for true.
        "attn_temperature_tuning": (True, 4),
        "no_rope_layer_interval": (_UNROTATED,),
    },
    folds=Folds(),
    # It takes experts apart where the others are packed.
    loads_packed=False,
)
