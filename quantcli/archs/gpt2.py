"""GPT-2: learned positions, LayerNorm and biases throughout; llama.cpp's "gpt2".

Its Conv1D layers hold weights as (in, out), so each is transposed. The first checkpoints have no
"transformer." before their names, and store the causal mask, which is left out.

Refused: the exact GELU (llama.cpp computes the tanh approximation), attention scaled otherwise
than by the size of a head, cross-attention.
Sources: Radford et al. 2019, llama.cpp's src/models/gpt2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, flag, integer, number
from quantcli.archs.fold import CENTRED
from quantcli.archs.header import Header
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, f32, u32


def _layer(name: str, source: str, *shape: str) -> Rule:
    transpose = source.startswith(("attn.", "mlp.")) and source.endswith(".weight")
    return Rule(f"blk.{{i}}.{name}", f"h.{{i}}.{source}", shape, transpose=transpose)


_OUTPUT = Rule("output.weight", "lm_head.weight", ("vocab", "hidden"))
_RULES = (
    Rule("token_embd.weight", "wte.weight", ("vocab", "hidden")),
    Rule("position_embd.weight", "wpe.weight", ("context", "hidden")),
    Rule("output_norm.weight", "ln_f.weight", ("hidden",)),
    Rule("output_norm.bias", "ln_f.bias", ("hidden",)),
    _layer("attn_norm.weight", "ln_1.weight", "hidden"),
    _layer("attn_norm.bias", "ln_1.bias", "hidden"),
    _layer("attn_qkv.weight", "attn.c_attn.weight", "qkv", "hidden"),
    _layer("attn_qkv.bias", "attn.c_attn.bias", "qkv"),
    _layer("attn_output.weight", "attn.c_proj.weight", "hidden", "hidden"),
    _layer("attn_output.bias", "attn.c_proj.bias", "hidden"),
    _layer("ffn_norm.weight", "ln_2.weight", "hidden"),
    _layer("ffn_norm.bias", "ln_2.bias", "hidden"),
    _layer("ffn_up.weight", "mlp.c_fc.weight", "ff", "hidden"),
    _layer("ffn_up.bias", "mlp.c_fc.bias", "ff"),
    _layer("ffn_down.weight", "mlp.c_proj.weight", "hidden", "ff"),
    _layer("ffn_down.bias", "mlp.c_proj.bias", "hidden"),
)


def _dims(config: Config) -> dict[str, int]:
    hidden = integer(config, "n_embd")
    return {
        "layers": integer(config, "n_layer"),
        "vocab": integer(config, "vocab_size"),
        "context": integer(config, "n_positions", "n_ctx"),
        "hidden": hidden,
        "qkv": 3 * hidden,
        "ff": integer(config, "n_inner", default=4 * hidden),
        "heads": integer(config, "n_head"),
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    return (replace(_OUTPUT, optional=flag(config, "tie_word_embeddings")), *_RULES)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        "vocab_size": u32(dims["vocab"]),
        "context_length": u32(dims["context"]),
        "embedding_length": u32(dims["hidden"]),
        "block_count": u32(dims["layers"]),
        "feed_forward_length": u32(dims["ff"]),
        "attention.head_count": u32(dims["heads"]),
        "attention.layer_norm_epsilon": f32(number(config, "layer_norm_epsilon")),
    }


def _check(config: Config, dims: Dims) -> None:
    if dims["hidden"] % dims["heads"]:
        raise ArchitectureError(
            f"n_embd {dims['hidden']} of {class_name(config)} in config.json is not a multiple "
            f"of n_head {dims['heads']}"
        )


def _config(header: Header) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **header.named(
            n_embd="embedding_length",
            n_layer="block_count",
            n_inner="feed_forward_length",
            n_positions="context_length",
            n_head="attention.head_count",
            layer_norm_epsilon="attention.layer_norm_epsilon",
        ),
    }


GPT2 = Architecture(
    name="gpt2",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    renames=((r"^transformer\.", ""),),
    published=((r"^(?!lm_head)", "transformer."),),
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    folds=CENTRED,
)
