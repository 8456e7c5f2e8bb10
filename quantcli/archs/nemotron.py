"""Nemotron 4 and Minitron: LayerNorms around 1, an MLP that squares a ReLU; "nemotron".

transformers multiplies by 1 + weight in its LayerNorm, so 1 is added. A part of each head is left
unrotated.
Sources: arXiv:2402.16819, transformers' modeling_nemotron.py, llama.cpp's src/models/nemotron.cpp.
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
from quantcli.archs.fold import LAYER_NORMED
from quantcli.archs.gemma2 import shift_norms
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, u32


def _rope(config: Config) -> Rope:
    return read_rope(config, ("default", "linear"), partial=True)


def _rules(config: Config) -> tuple[Rule, ...]:
    attention = biased(*ATTENTION) if flag(config, "attention_bias") else ATTENTION
    mlp = biased(*MLP[1:]) if flag(config, "mlp_bias") else MLP[1:]
    norms = biased(OUTPUT_NORM, *NORMS)
    return shift_norms((EMBEDDING, OUTPUT, *norms, *attention, *mlp))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims, epsilon="norm_eps", key=EPSILON),
        **rope_keys(_rope(config)),
        "rope.dimension_count": u32(partial_rotation(_rope(config), dims)),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(
        header, "NemotronForCausalLM", "nemotron", epsilon="norm_eps", key=EPSILON
    )
    return {
        **config,
        "rope_parameters": partial_config(config, header),
        "attention_bias": "blk.0.attn_q.bias" in header.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in header.shapes,
    }


NEMOTRON = Architecture(
    name="nemotron",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    fixed={"hidden_act": ("relu2",), "tie_word_embeddings": (False,)},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=LAYER_NORMED,
)
