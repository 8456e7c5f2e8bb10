"""Llama, Mistral and Mixtral: llama.cpp's "llama".

ggml rotates neighbouring pairs for this architecture where transformers rotates the two halves
of a head, so the rows of q and k (and their biases) are interleaved. Llama 3.1's frequency
scaling becomes the tensor rope_freqs.weight. Mixtral's experts are stacked into one tensor.

A Mistral sliding window is not part of llama.cpp's graph (a note says so). Sources: Llama
(arXiv:2302.13971), Mixtral (arXiv:2401.04088), llama.cpp's src/models/llama.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, flag, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
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
    unwindowed_note,
)
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.rope import llama3_factors, llama3_rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule, Values
from quantcli.types import MetaValue, u32

_ROTARY = {"attn_q": "heads", "attn_k": "kv_heads"}
_ATTENTION = tuple(replace(rule, rotary=_ROTARY.get(rule.name.split(".")[2])) for rule in ATTENTION)
_ATTENTION_BIASES = (
    layer("attn_q.bias", "self_attn.q_proj.bias", "q", rotary="heads"),
    layer("attn_k.bias", "self_attn.k_proj.bias", "kv", rotary="kv_heads"),
    layer("attn_v.bias", "self_attn.v_proj.bias", "kv"),
    layer("attn_output.bias", "self_attn.o_proj.bias", "hidden"),
)
_MLP_BIASES = (
    layer("ffn_gate.bias", "mlp.gate_proj.bias", "ff"),
    layer("ffn_up.bias", "mlp.up_proj.bias", "ff"),
    layer("ffn_down.bias", "mlp.down_proj.bias", "hidden"),
)
_EXPERTS = experts("block_sparse_moe", "w1", "w3", "w2")

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_FIXED = {"hidden_act": ("silu", "swish"), "num_nextn_predict_layers": (0,)}
_IGNORED = (r".*\.rotary_emb\.inv_freq",)


def rules(config: Config) -> tuple[Rule, ...]:
    """The tensors of a Llama, biases where config.json has them."""
    biases = _ATTENTION_BIASES if flag(config, "attention_bias") else ()
    mlp_biases = _MLP_BIASES if flag(config, "mlp_bias") else ()
    return (
        EMBEDDING, OUTPUT_NORM, output(config),
        *NORMS, *_ATTENTION, *biases, *MLP, *mlp_biases,
    )  # fmt: skip


def _mixture_rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *_ATTENTION, *_EXPERTS)


def keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """The key-values of a Llama."""
    return {
        **decoder_keys(config, dims),
        "rope.dimension_count": u32(dims["head_dim"]),
        **rope_keys(read_rope(config, _ROPE_TYPES)),
    }


def _mixture_dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    experts = integer(config, "num_local_experts", "num_experts")
    return {**dims, "experts": experts, "expert_ff": dims["ff"]}


def _mixture_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {**keys(config, dims), **expert_keys(config, dims)}


def _values(config: Config, dims: Dims) -> Values:
    rope = read_rope(config, _ROPE_TYPES)
    if rope["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(rope, dims["head_dim"])}


def _config(header: Header) -> dict[str, Any]:
    mixture = bool(header.keys.get("expert_count"))
    model = ("MixtralForCausalLM", "mixtral") if mixture else ("LlamaForCausalLM", "llama")
    config = decoder_config(header, *model)
    if "head_dim" not in config and "rope.dimension_count" in header.keys:
        config["head_dim"] = header.keys["rope.dimension_count"]
    if "rope_freqs.weight" in header.shapes:
        divisors = header.read("rope_freqs.weight").reshape(-1).astype(np.float64)
        config["rope_parameters"] = llama3_rope(divisors, config["rope_parameters"]["rope_theta"])
    if mixture:
        used = header.named(num_experts_per_tok="expert_used_count")
        return {**config, "num_local_experts": header.keys["expert_count"], **used}
    return {
        **config,
        "attention_bias": "blk.0.attn_output.bias" in header.shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.shapes,
    }


LLAMA = Architecture(
    name="llama",
    read_dims=attention_dims,
    read_rules=rules,
    to_keys=keys,
    to_config=_config,
    read_values=_values,
    read_notes=unwindowed_note,
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    fixed=_FIXED,
    ignored=_IGNORED,
    folds=DECODER,
)

MIXTRAL = Architecture(
    name="llama",
    read_dims=_mixture_dims,
    read_rules=_mixture_rules,
    to_keys=_mixture_keys,
    to_config=_config,
    read_values=_values,
    read_notes=unwindowed_note,
    defaults={"tie_word_embeddings": False, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    fixed=_FIXED,
    renames=((r"\.mlp\.", ".block_sparse_moe."),),
    ignored=_IGNORED,
    folds=DECODER,
)

INTERNLM3 = replace(
    LLAMA,
    fixed={**_FIXED, "bias": (False,), "qkv_bias": (False,)},
    defaults={**LLAMA.defaults, "head_dim": 128, "rms_norm_eps": 1e-5},
)
"""InternLM 3, whose class is Llama's in transformers."""


def _xverse(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "XverseForCausalLM", "xverse")
    return {**config, "hidden_act": "silu"}


XVERSE = replace(
    LLAMA,
    name="xverse",
    to_config=_xverse,
    check=check_square,
    fixed={**_FIXED, "attention_bias": (False,), "tie_word_embeddings": (False,)},
)
"""XVERSE 7B to 65B, likewise."""
