"""OLMoE: a mixture of experts in every layer, norms over all heads of q and k; "olmoe".

Refused: gates that are normalised over the chosen experts, clipped values and biases, which
llama.cpp does not have.
Sources: arXiv:2409.02060, transformers' modeling_olmoe.py, llama.cpp's src/models/olmoe.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    expert_keys,
    experts,
    layer,
    output,
)
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue

_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj")
_HEAD_NORMS = (
    layer("attn_q_norm.weight", "self_attn.q_norm.weight", "q"),
    layer("attn_k_norm.weight", "self_attn.k_norm.weight", "kv"),
)


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    return {**dims, "experts": integer(config, "num_experts"), "expert_ff": dims["ff"]}


def _check(config: Config, dims: Dims) -> None:
    check_square(config, dims)
    if dims["kv"] != dims["q"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {dims['kv_heads']} key-value heads, but "
            f"llama.cpp needs as many as there are attention heads, {dims['heads']}"
        )


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION, *_HEAD_NORMS, *_EXPERTS)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = rope_keys(read_rope(config, ("default", "linear")))
    return {**decoder_keys(config, dims), **rope, **expert_keys(config, dims)}


def _config(header: Header) -> dict[str, Any]:
    return {
        **decoder_config(header, "OlmoeForCausalLM", "olmoe"),
        **header.named(num_experts="expert_count", num_experts_per_tok="expert_used_count"),
        "norm_topk_prob": False,
    }


OLMOE = Architecture(
    name="olmoe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "norm_topk_prob": (False,),
        "tie_word_embeddings": (False,),
        "clip_qkv": (),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=DECODER,
)
