"""MPT: ALiBi in place of positions, LayerNorms without biases, clipped q, k and v; "mpt".

The GELU is the exact one, which llama.cpp approximates (a note says so). ALiBi's steepness is
config.json's, as in MosaicML's own code; transformers takes 8 whatever it says.

Refused: learned positions, norms on q and k, biases, shared key-value heads, prefix attention, and
a scale of the attention or of the logits other than the usual.
Sources: MosaicML's llm-foundry, transformers' modeling_mpt.py, llama.cpp's src/models/mpt.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, check_fixed, class_name, flag, integer, number, positive
from quantcli.archs.decoder import EPSILON, OUTPUT, exact_gelu_note
from quantcli.archs.fold import NORMED_MLP, FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, f32, u32

_STEEPEST = 8.0
_ATTENTION: dict[str, tuple[Any, ...]] = {
    "attn_type": ("multihead_attention",),
    "alibi": (True,),
    "qk_ln": (False,),
    "qk_gn": (False,),
    "rope": (False,),
    "prefix_lm": (False,),
    "softmax_scale": (),
    "sliding_window_size": (-1,),
}


def _layer(name: str, source: str, *shape: str) -> Rule:
    return Rule(f"blk.{{i}}.{name}.weight", f"transformer.blocks.{{i}}.{source}.weight", shape)


_RULES = (
    Rule("token_embd.weight", "transformer.wte.weight", ("vocab", "hidden")),
    Rule("output_norm.weight", "transformer.norm_f.weight", ("hidden",)),
    _layer("attn_norm", "norm_1", "hidden"),
    _layer("attn_qkv", "attn.Wqkv", "qkv", "hidden"),
    _layer("attn_output", "attn.out_proj", "hidden", "hidden"),
    _layer("ffn_norm", "norm_2", "hidden"),
    _layer("ffn_up", "ffn.up_proj", "ff", "hidden"),
    _layer("ffn_down", "ffn.down_proj", "hidden", "ff"),
)

_FOLDS = Folds(
    rules=(
        FoldRule("norm", ("blk.{i}.attn_norm",), ("blk.{i}.attn_qkv",)),
        NORMED_MLP,
        FoldRule("norm", ("output_norm",), ("output",)),
    ),
    basis="its LayerNorm subtracts the mean over the stream's channels",
    apart=("blk.{i}.attn_output", "blk.{i}.ffn_down"),
)


def _attention(config: Config) -> Mapping[str, Any]:
    found = config.get("attn_config") or {}
    if not isinstance(found, Mapping):
        raise ArchitectureError(
            f"attn_config of {class_name(config)} in config.json is {found!r}, expected an object"
        )
    return {**found, "architectures": config["architectures"]}


def _dims(config: Config) -> dict[str, int]:
    hidden, heads = integer(config, "d_model"), integer(config, "n_heads")
    if hidden % heads:
        raise ArchitectureError(
            f"d_model {hidden} of {class_name(config)} in config.json is not a multiple of "
            f"n_heads {heads}"
        )
    return {
        "layers": integer(config, "n_layers"),
        "vocab": integer(config, "vocab_size"),
        "hidden": hidden,
        "heads": heads,
        "qkv": 3 * hidden,
        "ff": 4 * hidden,
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    return (replace(OUTPUT, optional=flag(config, "tie_word_embeddings")), *_RULES)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    attention = _attention(config)
    keys = {
        "vocab_size": u32(dims["vocab"]),
        "context_length": u32(integer(config, "max_seq_len")),
        "embedding_length": u32(dims["hidden"]),
        "block_count": u32(dims["layers"]),
        "feed_forward_length": u32(dims["ff"]),
        "attention.head_count": u32(dims["heads"]),
        "attention.head_count_kv": u32(dims["heads"]),
        EPSILON: f32(number(config, "layer_norm_epsilon")),
        "attention.max_alibi_bias": f32(positive(attention, "alibi_bias_max", default=_STEEPEST)),
    }
    if attention.get("clip_qkv"):
        keys["attention.clamp_kqv"] = f32(positive(attention, "clip_qkv"))
    return keys


def _check(config: Config, dims: Dims) -> None:
    attention = _attention(config)
    check_fixed(attention, {**_ATTENTION, "kv_n_heads": (dims["heads"],)})


def _config(header: Header) -> dict[str, Any]:
    attention = header.named(clip_qkv="attention.clamp_kqv")
    if "attention.max_alibi_bias" in header.keys:
        # A whole number in transformers' configuration.
        attention["alibi_bias_max"] = int(header.keys["attention.max_alibi_bias"])
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        **header.named(
            d_model="embedding_length",
            n_layers="block_count",
            n_heads="attention.head_count",
            max_seq_len="context_length",
            layer_norm_epsilon=EPSILON,
        ),
        "attn_config": attention,
    }


MPT = Architecture(
    name="mpt",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    read_notes=lambda config: exact_gelu_note(config, "gelu"),
    defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "max_seq_len": 2048},
    fixed={
        "no_bias": (True,),
        "expansion_ratio": (4,),
        "logit_scale": (),
        "norm_type": ("low_precision_layernorm", "layernorm"),
    },
    folds=_FOLDS,
)
