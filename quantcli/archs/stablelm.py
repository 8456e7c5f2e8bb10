"""StableLM 3B and StableLM 2 1.6B: LayerNorms, a gated MLP, a quarter of each head rotated.

llama.cpp's "stablelm".

Refused: norms on each head of q and k and attention beside the MLP (StableLM 2 12B), which no
tiny model has shown to be right here.
Sources: Stability AI's model cards, transformers' modeling_stablelm.py, llama.cpp's
src/models/stablelm.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, flag
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    EPSILON,
    MLP,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    biased,
    check_square,
    decoder_config,
    decoder_keys,
    partial_config,
    partial_rotation,
)
from quantcli.archs.fold import GATED_LAYER_NORMED
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, boolean, u32


def _rope(config: Config) -> Rope:
    return read_rope(config, ("default", "linear"), partial=True)


def _rules(config: Config) -> tuple[Rule, ...]:
    qkv = biased(*ATTENTION[:3]) if flag(config, "use_qkv_bias") else ATTENTION[:3]
    return (EMBEDDING, OUTPUT, *biased(OUTPUT_NORM, *NORMS), *qkv, ATTENTION[3], *MLP)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims, epsilon="layer_norm_eps", key=EPSILON),
        **rope_keys(_rope(config)),
        "rope.dimension_count": u32(partial_rotation(_rope(config), dims)),
        "use_parallel_residual": boolean(False),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(
        header, "StableLmForCausalLM", "stablelm", epsilon="layer_norm_eps", key=EPSILON
    )
    return {
        **config,
        "rope_parameters": partial_config(config, header),
        "use_qkv_bias": "blk.0.attn_q.bias" in header.shapes,
    }


STABLELM = Architecture(
    name="stablelm",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "use_parallel_residual": (False,),
        "qk_layernorm": (False,),
        "tie_word_embeddings": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=GATED_LAYER_NORMED,
)
