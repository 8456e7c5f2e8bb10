"""Apertus: norms on each head of q and k, an MLP without a gate and with xIELU; "apertus".

Each layer has an activation of its own, whose four numbers checkpoints store as tensors and GGUF as
key-values. Llama 3.1's frequency scaling becomes the tensor rope_freqs.weight.

Refused: tied embeddings, since llama.cpp needs an output matrix of this architecture.
Sources: arXiv:2509.14233, xIELU (arXiv:2411.13010), transformers' modeling_apertus.py, llama.cpp's
src/models/apertus.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
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
)
from quantcli.archs.fold import DECODER, Folds
from quantcli.archs.header import Header
from quantcli.archs.rope import llama3_factors, llama3_rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, KeyRule, Rule, Values
from quantcli.types import MetaValue, u32

_NORMS = tuple(
    replace(rule, source=f"model.layers.{{i}}.{name}.weight")
    for rule, name in zip(NORMS, ("attention_layernorm", "feedforward_layernorm"), strict=True)
)
_ACTIVATION = "model.layers.{i}.mlp.act_fn"
_KEYED = (
    KeyRule("xielu.alpha_p", f"{_ACTIVATION}.alpha_p"),
    KeyRule("xielu.alpha_n", f"{_ACTIVATION}.alpha_n"),
    KeyRule("xielu.beta", f"{_ACTIVATION}.beta", ()),
    KeyRule("xielu.eps", f"{_ACTIVATION}.eps", ()),
)
_ROPE_TYPES = ("default", "linear", "llama3")
_FOLDS = Folds(
    rules=tuple(rule for rule in DECODER.rules if rule.kind != "gated"),
    writers=DECODER.writers,
    basis="",
    apart=("blk.{i}.ffn_down",),
)


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, OUTPUT, *_NORMS, *ATTENTION, *HEAD_NORMS, *MLP[1:])


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        "rope.dimension_count": u32(dims["head_dim"]),
        **rope_keys(read_rope(config, _ROPE_TYPES)),
    }


def _values(config: Config, dims: Dims) -> Values:
    rope = read_rope(config, _ROPE_TYPES)
    if rope["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(rope, dims["head_dim"])}


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "ApertusForCausalLM", "apertus")
    if "rope_freqs.weight" in header.shapes:
        divisors = header.read("rope_freqs.weight").reshape(-1).astype(np.float64)
        config["rope_parameters"] = llama3_rope(divisors, config["rope_parameters"]["rope_theta"])
    return config


APERTUS = Architecture(
    name="apertus",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    keyed=_KEYED,
    read_values=_values,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 12000000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 65536,
    },
    fixed={
        "hidden_act": ("xielu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "tie_word_embeddings": (False,),
        "post_norm": (False,),
        "qk_norm": (True,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=_FOLDS,
)
