"""GPT-NeoX, Pythia, Dolly: attention and MLP side by side, each behind its LayerNorm; "gptneox".

With ``use_parallel_residual`` off they follow one another. A part of each head is left unrotated;
q, k and v lie head by head in one matrix and are put one after another. Its GELU is the exact one,
which llama.cpp approximates (a note says so).

Refused: attention without biases, and embeddings as output matrix, which llama.cpp requires.
Sources: arXiv:2204.06745, arXiv:2304.01373, transformers' modeling_gpt_neox.py, llama.cpp's
src/models/gptneox.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, flag
from quantcli.archs.decoder import (
    EPSILON,
    attention_dims,
    biased,
    by_heads,
    check_square,
    decoder_config,
    decoder_keys,
    exact_gelu_note,
    partial_config,
    partial_rotation,
)
from quantcli.archs.fold import CENTRED
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, boolean, u32


def _layer(name: str, source: str, *shape: str) -> Rule:
    return Rule(f"blk.{{i}}.{name}.weight", f"gpt_neox.layers.{{i}}.{source}.weight", shape)


_RULES = (
    Rule("token_embd.weight", "gpt_neox.embed_in.weight", ("vocab", "hidden")),
    Rule("output.weight", "embed_out.weight", ("vocab", "hidden")),
    *biased(
        Rule("output_norm.weight", "gpt_neox.final_layer_norm.weight", ("hidden",)),
        _layer("attn_norm", "input_layernorm", "hidden"),
        _layer("ffn_norm", "post_attention_layernorm", "hidden"),
        _layer("attn_output", "attention.dense", "hidden", "q"),
        _layer("ffn_up", "mlp.dense_h_to_4h", "ff", "hidden"),
        _layer("ffn_down", "mlp.dense_4h_to_h", "hidden", "ff"),
    ),
    *by_heads(*biased(_layer("attn_qkv", "attention.query_key_value", "qkv", "hidden"))),
)


def _dims(config: Config) -> dict[str, int]:
    # There are no shared heads, whatever else a configuration says.
    dims = attention_dims({**config, "num_key_value_heads": None})
    return {**dims, "qkv": 3 * dims["q"]}


def _rules(config: Config) -> tuple[Rule, ...]:
    return _RULES


def _rope(config: Config) -> Rope:
    # Older files have names of their own for both.
    settled = {
        **config,
        "rope_theta": config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0,
        "partial_rotary_factor": config.get("partial_rotary_factor")
        or config.get("rotary_pct", 0.25),
    }
    return read_rope(settled, ("default", "linear"), partial=True)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims, epsilon="layer_norm_eps", key=EPSILON),
        **rope_keys(_rope(config)),
        "rope.dimension_count": u32(partial_rotation(_rope(config), dims)),
        "use_parallel_residual": boolean(flag(config, "use_parallel_residual")),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(
        header, "GPTNeoXForCausalLM", "gpt_neox", epsilon="layer_norm_eps", key=EPSILON
    )
    return {
        **config,
        "rope_parameters": partial_config(config, header),
        **header.named(use_parallel_residual="use_parallel_residual"),
    }


GPTNEOX = Architecture(
    name="gptneox",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    read_notes=lambda config: exact_gelu_note(config, config["hidden_act"]),
    defaults={"layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True},
    fixed={
        "hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        "attention_bias": (True,),
        "tie_word_embeddings": (False,),
    },
    renames=((r"^lm_head\.", "embed_out."),),
    ignored=(
        r".*\.attention\.(bias|masked_bias)",
        r".*\.rotary_emb\.inv_freq",
    ),
    folds=CENTRED,
)
