"""MiniCPM3: latent attention with a dense MLP, both scaled before they are added; "minicpm3".

llama.cpp keeps the expansion of keys and values whole here and rotates by halves. Its factors on
embeddings, residuals and logits are constants of its code.

Refused: other factors than those (``scale_emb``, ``scale_depth``, ``dim_model_base``), and queries
without a latent vector.
Sources: arXiv:2404.06395, transformers' modeling_minicpm3.py, llama.cpp's src/models/minicpm3.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name
from quantcli.archs.decoder import EMBEDDING, MLP, NORMS, OUTPUT_NORM, output
from quantcli.archs.fold import FoldRule
from quantcli.archs.header import Header
from quantcli.archs.longrope import long_config, long_keys, long_values
from quantcli.archs.mla import (
    COMPRESSION,
    EXPANSION,
    FOLDS,
    OUTPUT,
    has_query_latent,
    mla_config,
    mla_dims,
    mla_keys,
    mla_notes,
    query_rules,
)
from quantcli.archs.rope import Rope, read_rope
from quantcli.archs.rules import Dims, Rule, Values
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_LATENT = FoldRule("norm", ("blk.{i}.attn_kv_a_norm",), ("blk.{i}.attn_kv_b",), stream=False)


def _dims(config: Config) -> dict[str, int]:
    if config.get("v_head_dim") is not None:
        return mla_dims(config)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1 or hidden % heads:
        raise ArchitectureError(
            f"hidden_size {hidden!r} of {class_name(config)} in config.json is not a multiple of "
            f"num_attention_heads {heads!r}, and v_head_dim is not given"
        )
    return mla_dims({**config, "v_head_dim": hidden // heads})


def _check(config: Config, dims: Dims) -> None:
    if not has_query_latent(config):
        raise ArchitectureError(
            f"config.json of {class_name(config)} has no q_lora_rank, but llama.cpp computes it "
            "with one only"
        )


def _rope(config: Config) -> Rope:
    return read_rope(config, ("default", "longrope", "su"))


def _rules(config: Config) -> tuple[Rule, ...]:
    attention = (*query_rules(config), *COMPRESSION, EXPANSION, OUTPUT)
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *attention, *MLP)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = _rope(config)
    keys = mla_keys(config, dims, {**rope, "rope_type": "default"})
    return {
        **{key: value for key, value in keys.items() if not key.endswith("_mla")},
        "attention.head_count_kv": u32(dims["heads"]),
        "attention.key_length": u32(dims["nope"] + dims["rope"]),
        "attention.value_length": u32(dims["v_head"]),
        **({} if rope["rope_type"] == "default" else long_keys(rope)),
    }


def _values(config: Config, dims: Dims) -> Values:
    rope = _rope(config)
    return {} if rope["rope_type"] == "default" else long_values(rope, dims["rope"])


def _config(header: Header) -> dict[str, Any]:
    config = mla_config(header, "MiniCPM3ForCausalLM", "minicpm3")
    config["rope_parameters"] |= long_config(header)
    rotated = config["qk_rope_head_dim"]
    return {
        **config,
        "qk_nope_head_dim": header.keys.get("attention.key_length", rotated) - rotated,
        **header.named(v_head_dim="attention.value_length"),
    }


def _notes(config: Config) -> tuple[str, ...]:
    return mla_notes(config, {**_rope(config), "rope_type": "default"})


MINICPM3 = Architecture(
    name="minicpm3",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    read_values=_values,
    check=_check,
    read_notes=_notes,
    defaults={
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "kv_lora_rank": 256,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "scale_emb": (12,),
        "scale_depth": (1.4,),
        "dim_model_base": (256,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=replace(
        FOLDS,
        rules=(*(rule for rule in FOLDS.rules if rule.kind != "values"), _LATENT),
        apart=("blk.{i}.attn_output",),
    ),
)
