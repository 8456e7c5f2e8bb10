"""StarCoder 1, SantaCoder: GPT-2 with one key-value head for all queries; llama.cpp's "starcoder".

Learned positions, LayerNorm and biases throughout, matrices stored as (out, in). With
``multi_query`` off q, k and v lie head by head, and are put one after another.

Refused: the exact GELU (llama.cpp computes the tanh approximation), attention scaled otherwise
than by the size of a head, cross-attention.
Sources: arXiv:2305.06161, transformers' modeling_gpt_bigcode.py, llama.cpp's
src/models/starcoder.cpp.
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


def _layer(name: str, source: str, *shape: str) -> Rule:
    return Rule(f"blk.{{i}}.{name}.weight", f"h.{{i}}.{source}.weight", shape)


_EMBEDDINGS = (
    Rule("token_embd.weight", "wte.weight", ("vocab", "hidden")),
    Rule("position_embd.weight", "wpe.weight", ("context", "hidden")),
)
_FINAL = biased(Rule("output_norm.weight", "ln_f.weight", ("hidden",)))
_QKV = biased(_layer("attn_qkv", "attn.c_attn", "qkv", "hidden"))
_REST = biased(
    _layer("attn_norm", "ln_1", "hidden"),
    _layer("attn_output", "attn.c_proj", "hidden", "hidden"),
    _layer("ffn_norm", "ln_2", "hidden"),
    _layer("ffn_up", "mlp.c_fc", "ff", "hidden"),
    _layer("ffn_down", "mlp.c_proj", "hidden", "ff"),
)


def _dims(config: Config) -> dict[str, int]:
    hidden, heads = integer(config, "n_embd"), integer(config, "n_head")
    if hidden % heads:
        raise ArchitectureError(
            f"n_embd {hidden} of {class_name(config)} in config.json is not a multiple of "
            f"n_head {heads}"
        )
    kv_heads = 1 if flag(config, "multi_query") else heads
    return {
        "layers": integer(config, "n_layer"),
        "vocab": integer(config, "vocab_size"),
        "context": integer(config, "n_positions"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": hidden // heads,
        "qkv": hidden + 2 * kv_heads * (hidden // heads),
        "ff": integer(config, "n_inner", default=4 * hidden),
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    output = replace(OUTPUT, optional=flag(config, "tie_word_embeddings"))
    qkv = _QKV if flag(config, "multi_query") else by_heads(*_QKV)
    return (*_EMBEDDINGS, output, *_FINAL, *qkv, *_REST)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        "vocab_size": u32(dims["vocab"]),
        "context_length": u32(dims["context"]),
        "embedding_length": u32(dims["hidden"]),
        "block_count": u32(dims["layers"]),
        "feed_forward_length": u32(dims["ff"]),
        "attention.head_count": u32(dims["heads"]),
        "attention.head_count_kv": u32(dims["kv_heads"]),
        EPSILON: f32(number(config, "layer_norm_epsilon")),
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        **header.named(
            n_embd="embedding_length",
            n_layer="block_count",
            n_inner="feed_forward_length",
            n_positions="context_length",
            n_head="attention.head_count",
            layer_norm_epsilon=EPSILON,
        ),
        "multi_query": header.keys.get("attention.head_count_kv") == 1,
    }


STARCODER = Architecture(
    name="starcoder",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "activation_function": "gelu_pytorch_tanh",
    },
    fixed={
        "activation_function": ("gelu_pytorch_tanh", "gelu_new"),
        "scale_attn_weights": (True,),
        "add_cross_attention": (False,),
    },
    renames=((r"^transformer\.", ""),),
    published=((r"^(?!lm_head)", "transformer."),),
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    folds=CENTRED,
    loads_packed=False,
)
