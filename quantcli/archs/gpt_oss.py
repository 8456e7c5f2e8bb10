"""gpt-oss 20B and 120B: experts with biases, sinks in attention, a window in each other layer.

Gate and up of an expert take turns in one matrix, which is stored with its inputs as rows, in 16
bits or in MXFP4 blocks (`quantcli.layouts.mxfp4`). A sink is a logit of each head that takes its
share of the attention and gives no value.

llama.cpp rounds the ends of YaRN's ramp to whole dimensions, as YaRN itself does; the published
models do not (``truncate: false``), which is said in a note. Refused: other constants of the gate
than llama.cpp has in its code, models without biases.
Sources: OpenAI's model card (arXiv:2508.10925), transformers' modeling_gpt_oss.py, llama.cpp's
src/models/openai-moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, flag, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    biased,
    decoder_config,
    decoder_keys,
    expert_keys,
    layer,
)
from quantcli.archs.gemma2 import layer_pattern, windowed_layers
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, u32

_EVERY = 2
_INPUT_NORM, _POST_NORM = NORMS
_POST_NORM = replace(_POST_NORM, name="blk.{i}.post_attention_norm.weight")
_HALVES = "mlp.experts.gate_up_proj"


def _half(name: str, index: int) -> tuple[Rule, Rule]:
    """Gate's or up's matrices and biases, out of what both take turns in."""
    weight = replace(
        layer(f"{name}.weight", _HALVES, "experts", "ff", "hidden"),
        stored=("experts", "hidden", "ff2"),
        parts=(
            Part(
                ("experts", "hidden", "ff", 2), (0, 2, 3, 1), cut=((3, index, index + 1),)
            ),
        ),
    )  # fmt: skip
    bias = replace(
        layer(f"{name}.bias", f"{_HALVES}_bias", "experts", "ff"),
        stored=("experts", "ff2"),
        parts=(Part(("experts", "ff", 2), cut=((2, index, index + 1),)),),
    )
    return weight, bias


_EXPERTS = (
    *biased(layer("ffn_gate_inp.weight", "mlp.router.weight", "experts", "hidden")),
    *_half("ffn_gate_exps", 0),
    *_half("ffn_up_exps", 1),
    replace(
        layer("ffn_down_exps.weight", "mlp.experts.down_proj", "experts", "hidden", "ff"),
        stored=("experts", "ff", "hidden"),
        parts=(Part(("experts", "ff", "hidden"), (0, 2, 1)),),
    ),
    layer("ffn_down_exps.bias", "mlp.experts.down_proj_bias", "experts", "hidden"),
)
_SINKS = layer("attn_sinks.weight", "self_attn.sinks", "heads")


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    return {
        **dims,
        "experts": integer(config, "num_local_experts", "num_experts"),
        "ff2": 2 * dims["ff"],
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    return (
        EMBEDDING, OUTPUT_NORM, OUTPUT, _INPUT_NORM, _POST_NORM, *biased(*ATTENTION), _SINKS,
        *_EXPERTS,
    )  # fmt: skip


def _rope(config: Config) -> Rope:
    rope = read_rope(config, ("default", "linear", "yarn"))
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        rope = {
            **rope, "rope_type": "yarn", "factor": 32.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        }  # fmt: skip
    return rope


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    kinds = windowed_layers(config, dims["layers"], _EVERY)
    keys = {
        **decoder_keys(config, dims),
        **rope_keys({**_rope(config), "truncate": None}),
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["ff"]),
        "attention.sliding_window": u32(integer(config, "sliding_window")),
    }
    if kinds != layer_pattern(dims["layers"], _EVERY):
        keys["attention.sliding_window_pattern"] = array(
            "bool", [kind == "sliding_attention" for kind in kinds]
        )
    return keys


def _check(config: Config, dims: Dims) -> None:
    kinds = windowed_layers(config, dims["layers"], _EVERY)
    if len(kinds) != dims["layers"] or "sliding_attention" not in kinds:
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json is {kinds!r}, but llama.cpp needs "
            f"one for each of {dims['layers']} layers, sliding_attention among them"
        )


def _notes(config: Config) -> tuple[str, ...]:
    rope = _rope(config)
    if rope["rope_type"] != "yarn" or flag(rope, "truncate", True):
        return ()
    return (
        "config.json sets truncate of yarn to false; llama.cpp rounds the ends of YaRN's ramp to "
        "whole dimensions all the same, which changes logits by some hundredths of their deviation",
    )


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "GptOssForCausalLM", "gpt_oss")
    pattern = header.keys.get("attention.sliding_window_pattern")
    kinds = layer_pattern(int(config.get("num_hidden_layers", 1)), _EVERY)
    if pattern is not None:
        kinds = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    return {
        **config,
        **header.named(
            sliding_window="attention.sliding_window",
            num_local_experts="expert_count",
            num_experts_per_tok="expert_used_count",
        ),
        "layer_types": kinds,
    }


GPT_OSS = Architecture(
    name="gpt-oss",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    read_notes=_notes,
    defaults={
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),
        "swiglu_limit": (7.0,),
        "tie_word_embeddings": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
