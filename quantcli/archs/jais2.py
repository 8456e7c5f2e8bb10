"""Jais 2: LayerNorms, biases everywhere, an MLP that squares a ReLU; llama.cpp's "jais2".

Source: Inception's model cards, transformers' modeling_jais2.py, llama.cpp's src/models/jais2.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    EPSILON,
    MLP,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    biased,
    decoder_config,
    decoder_keys,
    output,
)
from quantcli.archs.fold import LAYER_NORMED
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, u32

_BIASED = biased(OUTPUT_NORM, *NORMS, *ATTENTION, *MLP[1:])


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, output(config), *_BIASED)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims, epsilon="layer_norm_eps", key=EPSILON),
        **rope_keys(read_rope(config, ("default", "linear", "yarn"))),
        "rope.dimension_count": u32(dims["head_dim"]),
    }


def _config(header: Header) -> dict[str, Any]:
    return decoder_config(
        header, "Jais2ForCausalLM", "jais2", epsilon="layer_norm_eps", key=EPSILON
    )


JAIS2 = Architecture(
    name="jais2",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0, "layer_norm_eps": 1e-5},
    fixed={"hidden_act": ("relu2",), "attention_bias": (True,), "mlp_bias": (True,)},
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=LAYER_NORMED,
)
