"""BERT, RoBERTa, XLM-R and DistilBERT: encoders for embeddings and rerankers; llama.cpp's "bert".

RoBERTa and its kin number positions from behind the padding token's id, and the rows before are
left out. The pooler is used by BERT's classifier alone, and the heads of masked language models
not at all. The usual GELU is the exact one, which llama.cpp approximates (a note says so).

Refused: relative positions, decoders, and DistilBERT's classifier, whose ReLU is tanh in
llama.cpp.
Sources: arXiv:1810.04805, arXiv:1907.11692, arXiv:1911.02116, transformers' modeling_bert.py,
modeling_roberta.py and modeling_distilbert.py, llama.cpp's src/models/bert.cpp and
``build_pooling``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import (
    EPSILON,
    attention_dims,
    biased,
    check_square,
    decoder_keys,
    exact_gelu_note,
)
from quantcli.archs.encoder import (
    classifier_config,
    encoder_dims,
    encoder_keys,
    is_classifier,
)
from quantcli.archs.header import Header
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32


def _layer(name: str, source: str, *shape: str) -> Rule:
    return Rule(f"blk.{{i}}.{name}.weight", f"encoder.layer.{{i}}.{source}.weight", shape)


EMBEDDINGS = (
    Rule("token_embd.weight", "embeddings.word_embeddings.weight", ("vocab", "hidden")),
    Rule("token_types.weight", "embeddings.token_type_embeddings.weight", ("types", "hidden")),
    *biased(Rule("token_embd_norm.weight", "embeddings.LayerNorm.weight", ("hidden",))),
)
_POSITIONS = Rule(
    "position_embd.weight",
    "embeddings.position_embeddings.weight",
    ("context", "hidden"),
    stored=("positions", "hidden"),
    parts=(Part(("positions", "hidden"), cut=((0, "offset", "positions"),)),),
)
LAYERS = biased(
    _layer("attn_q", "attention.self.query", "q", "hidden"),
    _layer("attn_k", "attention.self.key", "kv", "hidden"),
    _layer("attn_v", "attention.self.value", "kv", "hidden"),
    _layer("attn_output", "attention.output.dense", "hidden", "q"),
    _layer("attn_output_norm", "attention.output.LayerNorm", "hidden"),
    _layer("ffn_up", "intermediate.dense", "ff", "hidden"),
    _layer("ffn_down", "output.dense", "hidden", "ff"),
    _layer("layer_output_norm", "output.LayerNorm", "hidden"),
)
_POOLED = biased(
    Rule("cls.weight", "pooler.dense.weight", ("hidden", "hidden")),
    Rule("cls.output.weight", "classifier.weight", ("labels", "hidden")),
)
_CLASSIFIER = biased(
    Rule("cls.weight", "classifier.dense.weight", ("hidden", "hidden")),
    Rule("cls.output.weight", "classifier.out_proj.weight", ("labels", "hidden")),
)
SPELLINGS = (
    (r"^(bert|roberta|distilbert|camembert|xlm_roberta)\.", ""),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)
IGNORED = (
    r"embeddings\.(position_ids|token_type_ids)",
    r"pooler\.dense\.(weight|bias)",
    r"cls\.(predictions|seq_relationship)\..*",
    r"lm_head\..*",
)
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


def _dims(config: Config) -> dict[str, int]:
    positions = integer(config, "max_position_embeddings")
    return {
        **attention_dims(config),
        **encoder_dims(config),
        "types": integer(config, "type_vocab_size"),
        "positions": positions,
        "offset": 0,
        "context": positions,
    }


def _shifted_dims(config: Config) -> dict[str, int]:
    dims = _dims(config)
    offset = integer(config, "pad_token_id") + 1
    if offset >= dims["positions"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {dims['positions']} positions, the first "
            f"{offset} of which are before those of a text"
        )
    return {**dims, "offset": offset, "context": dims["positions"] - offset}


def _rules(config: Config) -> tuple[Rule, ...]:
    head = _POOLED if is_classifier(config) else ()
    return (*EMBEDDINGS, replace(_POSITIONS, parts=()), *LAYERS, *head)


def _shifted_rules(config: Config) -> tuple[Rule, ...]:
    head = _CLASSIFIER if is_classifier(config) else ()
    return (*EMBEDDINGS, _POSITIONS, *LAYERS, *head)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims, epsilon="layer_norm_eps", key=EPSILON),
        "context_length": u32(dims["context"]),
        **encoder_keys(config, dims),
    }


def _config(header: Header) -> dict[str, Any]:
    if "token_types.weight" not in header.shapes:
        return _distilled_config(header)
    return {
        **classifier_config(header, "Bert"),
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


def _distilled_config(header: Header) -> dict[str, Any]:
    return {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        **header.named(
            dim="embedding_length",
            n_layers="block_count",
            hidden_dim="feed_forward_length",
            max_position_embeddings="context_length",
            n_heads="attention.head_count",
        ),
    }


BERT = Architecture(
    name="bert",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    read_notes=lambda config: exact_gelu_note(config, config["hidden_act"]),
    defaults=DEFAULTS,
    fixed=_FIXED,
    renames=SPELLINGS,
    ignored=IGNORED,
)
BERT_CLASSIFIER = replace(
    BERT,
    ignored=(IGNORED[0], *IGNORED[2:]),
    published=((r"^(?!classifier)", "bert."),),
)
ROBERTA = replace(
    BERT,
    read_dims=_shifted_dims,
    read_rules=_shifted_rules,
    defaults=DEFAULTS | {"pad_token_id": 1},
)
ROBERTA_CLASSIFIER = replace(ROBERTA, published=((r"^(?!classifier)", "roberta."),))

_NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
"""DistilBERT's names for BERT's."""
_DISTILLED = tuple(
    (rf"^transformer\.layer\.(\d+)\.{re.escape(theirs)}\.", rf"encoder.layer.\1.{ours}.")
    for ours, theirs in _NAMES.items()
)
_REDISTILLED = tuple(
    (rf"^encoder\.layer\.(\d+)\.{re.escape(ours)}\.", rf"transformer.layer.\1.{theirs}.")
    for ours, theirs in _NAMES.items()
)


def _distilled(config: Config) -> dict[str, Any]:
    """DistilBERT's configuration under BERT's names."""
    return {
        **config,
        "hidden_size": config.get("dim", config["hidden_size"]),
        "num_hidden_layers": config.get("n_layers", config["num_hidden_layers"]),
        "num_attention_heads": config.get("n_heads", config["num_attention_heads"]),
        "intermediate_size": config.get("hidden_dim", config["intermediate_size"]),
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-12,
    }


DISTILBERT = replace(
    BERT,
    read_dims=lambda config: _dims(_distilled(config)),
    read_rules=lambda config: tuple(
        rule for rule in _rules(config) if rule.name != "token_types.weight"
    ),
    to_keys=lambda config, dims: _keys(_distilled(config), dims),
    read_notes=lambda config: exact_gelu_note(config, config["activation"]),
    defaults=DEFAULTS | {"num_hidden_layers": 6, "activation": "gelu"},
    fixed={"activation": _FIXED["hidden_act"]},
    renames=(*SPELLINGS, *_DISTILLED),
    ignored=(*IGNORED, r"vocab_(transform|layer_norm|projector)\..*"),
    published=_REDISTILLED,
)
