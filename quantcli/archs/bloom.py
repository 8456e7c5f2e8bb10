"""BLOOM: ALiBi in place of positions, a LayerNorm behind the embeddings; llama.cpp's "bloom".

q, k and v lie head by head in one matrix and are put one after another. ALiBi has no length of its
own; ``seq_length`` is what the model was trained with.

Refused: residuals taken behind the LayerNorm, which llama.cpp does not have.
Sources: arXiv:2211.05100, transformers' modeling_bloom.py, llama.cpp's src/models/bloom.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, flag, integer, number
from quantcli.archs.decoder import EPSILON, OUTPUT, biased, by_heads
from quantcli.archs.fold import CENTRED
from quantcli.archs.header import Header
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, f32, u32

_LENGTH = 2048


def _layer(name: str, source: str, *shape: str) -> Rule:
    return Rule(f"blk.{{i}}.{name}.weight", f"h.{{i}}.{source}.weight", shape)


_RULES = (
    Rule("token_embd.weight", "word_embeddings.weight", ("vocab", "hidden")),
    *biased(
        Rule("token_embd_norm.weight", "word_embeddings_layernorm.weight", ("hidden",)),
        Rule("output_norm.weight", "ln_f.weight", ("hidden",)),
        _layer("attn_norm", "input_layernorm", "hidden"),
        _layer("attn_output", "self_attention.dense", "hidden", "hidden"),
        _layer("ffn_norm", "post_attention_layernorm", "hidden"),
        _layer("ffn_up", "mlp.dense_h_to_4h", "ff", "hidden"),
        _layer("ffn_down", "mlp.dense_4h_to_h", "hidden", "ff"),
    ),
    *by_heads(*biased(_layer("attn_qkv", "self_attention.query_key_value", "qkv", "hidden"))),
)


def _dims(config: Config) -> dict[str, int]:
    hidden = integer(config, "hidden_size", "n_embed")
    heads = integer(config, "n_head", "num_attention_heads")
    if hidden % heads:
        raise ArchitectureError(
            f"hidden_size {hidden} of {class_name(config)} in config.json is not a multiple of "
            f"n_head {heads}"
        )
    return {
        "layers": integer(config, "n_layer", "num_hidden_layers"),
        "vocab": integer(config, "vocab_size"),
        "hidden": hidden,
        "heads": heads,
        "head_dim": hidden // heads,
        "qkv": 3 * hidden,
        "ff": 4 * hidden,
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    return (replace(OUTPUT, optional=flag(config, "tie_word_embeddings")), *_RULES)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        "vocab_size": u32(dims["vocab"]),
        "context_length": u32(integer(config, "seq_length", default=_LENGTH)),
        "embedding_length": u32(dims["hidden"]),
        "block_count": u32(dims["layers"]),
        "feed_forward_length": u32(dims["ff"]),
        "attention.head_count": u32(dims["heads"]),
        "attention.head_count_kv": u32(dims["heads"]),
        EPSILON: f32(number(config, "layer_norm_epsilon")),
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        **header.named(
            hidden_size="embedding_length",
            n_layer="block_count",
            n_head="attention.head_count",
            seq_length="context_length",
            layer_norm_epsilon=EPSILON,
        ),
    }


BLOOM = Architecture(
    name="bloom",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
    fixed={"apply_residual_connection_post_layernorm": (False,)},
    renames=((r"^transformer\.", ""),),
    published=((r"^(?!lm_head)", "transformer."),),
    folds=CENTRED,
)
