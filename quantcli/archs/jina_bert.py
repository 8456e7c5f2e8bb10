"""Jina's second embedders: BERT with ALiBi for positions and a gated MLP; "jina-bert-v2".

Two tokens attend to each other the less the further apart they are, whichever comes first. Gate and
linear half of the MLP are one matrix. The GELU is the exact one, which llama.cpp approximates (a
note says so).

Refused: MLPs gated otherwise, norms on q and k (the embedder of code), and classifiers.
Sources: arXiv:2310.19923, the modeling_bert.py of the checkpoints, llama.cpp's src/models/bert.cpp
and jina-bert-v2.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.bert import DEFAULTS, EMBEDDINGS, IGNORED, LAYERS, SPELLINGS
from quantcli.archs.config import Config, integer
from quantcli.archs.decoder import (
    EPSILON,
    attention_dims,
    biased,
    check_square,
    decoder_keys,
    exact_gelu_note,
)
from quantcli.archs.encoder import encoder_keys
from quantcli.archs.header import Header
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue

_MLP = "encoder.layer.{i}.mlp"
_RULES = (
    *EMBEDDINGS,
    *(rule for rule in LAYERS if ".attn_" in rule.name),
    Rule("blk.{i}.ffn_up.weight", f"{_MLP}.gated_layers.weight", ("up", "hidden")),
    *biased(
        Rule("blk.{i}.ffn_down.weight", f"{_MLP}.wo.weight", ("hidden", "ff")),
        Rule("blk.{i}.layer_output_norm.weight", f"{_MLP}.layernorm.weight", ("hidden",)),
    ),
)


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    return {**dims, "up": 2 * dims["ff"], "types": integer(config, "type_vocab_size")}


def _rules(config: Config) -> tuple[Rule, ...]:
    return _RULES


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims, epsilon="layer_norm_eps", key=EPSILON),
        **encoder_keys(config, dims),
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        "architectures": ["JinaBertModel"],
        "model_type": "bert",
        **header.named(
            hidden_size="embedding_length",
            num_hidden_layers="block_count",
            intermediate_size="feed_forward_length",
            max_position_embeddings="context_length",
            num_attention_heads="attention.head_count",
            layer_norm_eps=EPSILON,
        ),
        "type_vocab_size": header.shapes["token_types.weight"][0],
    }


JINA_BERT = Architecture(
    name="jina-bert-v2",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    read_notes=lambda config: exact_gelu_note(config, "gelu"),
    defaults=DEFAULTS,
    fixed={
        "position_embedding_type": ("alibi",),
        "feed_forward_type": ("geglu",),
        "is_decoder": (False,),
    },
    renames=SPELLINGS,
    ignored=IGNORED,
)
