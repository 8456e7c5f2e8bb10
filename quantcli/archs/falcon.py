"""Falcon 7B, 11B, 40B and 180B: attention and MLP side by side, no biases; llama.cpp's "falcon".

q, k and v lie in one matrix by key-value head: the queries that share it, then its key, then its
value; they are put one after another. The larger models have a LayerNorm for each of the two sides,
the smaller ones one for both. The GELU is the exact one, which llama.cpp approximates (a note says
so).

Refused: biases, ALiBi and attention before the MLP (falcon-rw), which llama.cpp does not have.
Sources: arXiv:2311.16867, transformers' modeling_falcon.py, llama.cpp's src/models/falcon.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, flag, integer
from quantcli.archs.decoder import (
    EPSILON,
    OUTPUT,
    attention_dims,
    biased,
    check_square,
    decoder_config,
    decoder_keys,
    exact_gelu_note,
)
from quantcli.archs.fold import FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.types import MetaValue


def _layer(name: str, source: str, *shape: str) -> Rule:
    return Rule(f"blk.{{i}}.{name}.weight", f"h.{{i}}.{source}.weight", shape)


_GROUPS = ("kv_heads", "key_and_value", "head_dim", "hidden")
_QKV = replace(
    _layer("attn_qkv", "self_attention.query_key_value", "qkv", "hidden"),
    parts=(
        Part(_GROUPS, cut=((1, 0, "sharers"),)),
        Part(_GROUPS, cut=((1, "sharers", "key"),)),
        Part(_GROUPS, cut=((1, "key", "key_and_value"),)),
    ),
)
_RULES = (
    Rule("token_embd.weight", "word_embeddings.weight", ("vocab", "hidden")),
    *biased(Rule("output_norm.weight", "ln_f.weight", ("hidden",))),
    _QKV,
    _layer("attn_output", "self_attention.dense", "hidden", "q"),
    _layer("ffn_up", "mlp.dense_h_to_4h", "ff", "hidden"),
    _layer("ffn_down", "mlp.dense_4h_to_h", "hidden", "ff"),
)
_ONE_NORM = biased(_layer("attn_norm", "input_layernorm", "hidden"))
_TWO_NORMS = biased(
    _layer("attn_norm", "ln_mlp", "hidden"),
    _layer("attn_norm_2", "ln_attn", "hidden"),
)
_FOLDS = Folds(
    rules=(
        FoldRule("values", ("blk.{i}.attn_qkv",), ("blk.{i}.attn_output",), part="v"),
        FoldRule("norm", ("output_norm",), ("output",)),
    ),
    basis="its LayerNorm subtracts the mean over the stream's channels",
    apart=("blk.{i}.attn_qkv", "blk.{i}.attn_norm_2", "blk.{i}.ffn_up", "blk.{i}.ffn_down"),
)


def _settled(config: Config) -> dict[str, Any]:
    """The configuration under the names of other families."""
    grouped = flag(config, "new_decoder_architecture")
    heads = integer(config, "num_attention_heads", "n_head")
    kv_heads = integer(config, "num_kv_heads", "n_head_kv", default=heads)
    hidden = integer(config, "hidden_size", "n_embed")
    return {
        **config,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if not grouped and flag(config, "multi_query") else kv_heads,
        "num_hidden_layers": integer(config, "num_hidden_layers", "n_layer"),
        "intermediate_size": integer(config, "ffn_hidden_size", default=4 * hidden),
    }


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(_settled(config))
    sharers = dims["heads"] // dims["kv_heads"]
    return {
        **dims,
        "qkv": dims["q"] + 2 * dims["kv"],
        "sharers": sharers,
        "key": sharers + 1,
        "key_and_value": sharers + 2,
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    output = replace(OUTPUT, optional=flag(config, "tie_word_embeddings"))
    return (output, *_RULES, *(_TWO_NORMS if _norms(config) == 2 else _ONE_NORM))


def _norms(config: Config) -> int:
    """How many LayerNorms a layer has."""
    grouped = flag(config, "new_decoder_architecture")
    return integer(config, "num_ln_in_parallel_attn", default=2) if grouped else 1


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(_settled(config), dims, epsilon="layer_norm_epsilon", key=EPSILON),
        **rope_keys(read_rope(config, ("default", "linear"))),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(
        header, "FalconForCausalLM", "falcon", epsilon="layer_norm_epsilon", key=EPSILON
    )
    config["ffn_hidden_size"] = config.pop("intermediate_size", None)
    kv_heads = config.pop("num_key_value_heads", 1)
    config.pop("head_dim", None)
    two = "blk.0.attn_norm_2.weight" in header.shapes
    grouped = two or kv_heads != 1
    return {
        **config,
        "num_kv_heads": kv_heads,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": (2 if two else 1) if grouped else None,
        "multi_query": kv_heads == 1,
    }


FALCON = Architecture(
    name="falcon",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    read_notes=lambda config: exact_gelu_note(config, config["activation"]),
    defaults={
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "activation": "gelu",
        "new_decoder_architecture": False,
        "multi_query": True,
    },
    fixed={
        "activation": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
        "alibi": (False,),
        "bias": (False,),
        "parallel_attn": (True,),
        "num_ln_in_parallel_attn": (1, 2),
    },
    renames=((r"^transformer\.", ""),),
    published=((r"^(?!lm_head)", "transformer."),),
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.maybe_rotary\.inv_freq"),
    folds=_FOLDS,
    loads_packed=False,
)
