"""OLMo 2 and 3: norms after attention and MLP only, and over all heads of q and k; "olmo2".

OLMo 3 attends through a sliding window in all layers but each fourth, or as ``layer_types`` says,
and scales positions in the other layers alone; llama.cpp does the same where it has a window.

Refused: biases, which no published model has.
Sources: arXiv:2501.00656, transformers' modeling_olmo2.py and modeling_olmo3.py, llama.cpp's
src/models/olmo2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, integer, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    OUTPUT_NORM,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
    output,
)
from quantcli.archs.fold import DECODER, Folds
from quantcli.archs.gemma2 import windowed_layers
from quantcli.archs.header import Header
from quantcli.archs.rope import read_layer_rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, array, f32, u32

_EVERY = 4
_NORMS = (
    layer("attn_q_norm.weight", "self_attn.q_norm.weight", "q"),
    layer("attn_k_norm.weight", "self_attn.k_norm.weight", "kv"),
    layer("post_attention_norm.weight", "post_attention_layernorm.weight", "hidden"),
    layer("post_ffw_norm.weight", "post_feedforward_layernorm.weight", "hidden"),
)
FOLDS = Folds(
    rules=tuple(
        rule for rule in DECODER.rules if rule.kind != "norm" or rule.consumers == ("output",)
    ),
    writers=DECODER.writers,
    basis="the norms after its attention and MLP weigh the stream's channels one by one",
    apart=(
        *(f"blk.{{i}}.attn_{name}" for name in "qkv"), "blk.{i}.ffn_gate", "blk.{i}.ffn_up",
    ),
)  # fmt: skip


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *ATTENTION, *_NORMS, *MLP)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {**decoder_keys(config, dims), **rope_keys(read_rope(config, ("default", "yarn")))}


def _windowed_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    types = windowed_layers(config, dims["layers"], _EVERY)
    full = read_layer_rope(config, "full_attention", "rope_theta", ("default", "yarn"))
    local = read_layer_rope(config, "sliding_attention", "rope_theta", ("default",))
    return {
        **decoder_keys(config, dims),
        **rope_keys(full),
        "rope.freq_base_swa": f32(positive(local, "rope_theta")),
        "attention.sliding_window": u32(integer(config, "sliding_window")),
        "attention.sliding_window_pattern": array(
            "bool", [kind == "sliding_attention" for kind in types]
        ),
    }


def _config(header: Header) -> dict[str, Any]:
    windowed = "attention.sliding_window" in header.keys
    model = ("Olmo3ForCausalLM", "olmo3") if windowed else ("Olmo2ForCausalLM", "olmo2")
    config = decoder_config(header, *model)
    if not windowed:
        return config
    pattern = header.keys.get("attention.sliding_window_pattern", [])
    local = header.keys.get("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])
    return {
        **config,
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "sliding_window": header.keys["attention.sliding_window"],
        "layer_types": ["sliding_attention" if window else "full_attention" for window in pattern],
    }


OLMO2 = Architecture(
    name="olmo2",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=FOLDS,
)

OLMO3 = replace(OLMO2, to_keys=_windowed_keys, defaults={**OLMO2.defaults, "sliding_window": 4096})
