"""Phi-1.5 and Phi-2: attention and MLP side by side behind one LayerNorm; "phi2".

Biases everywhere, the head's too, and a part of each head unrotated.

Refused: norms on q and k, which llama.cpp does not have.
Sources: arXiv:2309.05463, transformers' modeling_phi.py, llama.cpp's src/models/phi2.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    EPSILON,
    NORMS,
    OUTPUT,
    attention_dims,
    biased,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
    partial_config,
    partial_rotation,
)
from quantcli.archs.fold import VALUES, FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, u32

_OUTPUT_NORM = Rule("output_norm.weight", "model.final_layernorm.weight", ("hidden",))
_ATTENTION = (
    *ATTENTION[:3],
    layer("attn_output.weight", "self_attn.dense.weight", "hidden", "q"),
)
_MLP = (
    layer("ffn_up.weight", "mlp.fc1.weight", "ff", "hidden"),
    layer("ffn_down.weight", "mlp.fc2.weight", "hidden", "ff"),
)
_FOLDS = Folds(
    rules=(
        FoldRule(
            "norm",
            ("blk.{i}.attn_norm",),
            ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v", "blk.{i}.ffn_up"),
        ),
        VALUES,
        FoldRule("norm", ("output_norm",), ("output",)),
    ),
    basis="its LayerNorm subtracts the mean over the stream's channels",
    apart=("blk.{i}.ffn_down",),
)


def _rope(config: Config) -> Rope:
    return read_rope(config, ("default",), partial=True)


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, *biased(OUTPUT, _OUTPUT_NORM, NORMS[0], *_ATTENTION, *_MLP))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims, epsilon="layer_norm_eps", key=EPSILON),
        **rope_keys(_rope(config)),
        "rope.dimension_count": u32(partial_rotation(_rope(config), dims)),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "PhiForCausalLM", "phi", epsilon="layer_norm_eps", key=EPSILON)
    return {**config, "rope_parameters": partial_config(config, header)}


PHI2 = Architecture(
    name="phi2",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    defaults={
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    fixed={
        "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),
        "qk_layernorm": (False,),
        "tie_word_embeddings": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.self_attn\.bias", r".*masked_bias"),
    folds=_FOLDS,
)
