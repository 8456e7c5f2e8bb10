"""ModernBERT: an encoder with rotation, alternating attention and gated MLPs; "modern-bert".

Every third layer sees the whole text, the others ``local_attention`` tokens around each, with a
base of rotation of their own. The first layer has no norm before its attention. The usual GELU is
the exact one, which llama.cpp approximates (a note says so).

Refused: biases, which llama.cpp does not have here.
Sources: arXiv:2412.13663, transformers' modeling_modernbert.py, llama.cpp's
src/models/modern-bert.cpp and ``build_pooling``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import (
    EPSILON,
    attention_dims,
    check_square,
    decoder_keys,
    exact_gelu_note,
    layer,
)
from quantcli.archs.encoder import (
    classifier_config,
    encoder_dims,
    encoder_keys,
    is_classifier,
)
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, read_layer_rope, rope_config, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, text, u32

_FULL, _WINDOWED = "full_attention", "sliding_attention"
_POOLINGS = {"mean": 1, "cls": 2}
_EVERY = 3
_CLASSIFIER = (
    Rule("cls.weight", "head.dense.weight", ("hidden", "hidden")),
    Rule("cls.norm.weight", "head.norm.weight", ("hidden",)),
    Rule("cls.output.weight", "classifier.weight", ("labels", "hidden")),
    Rule("cls.output.bias", "classifier.bias", ("labels",)),
)


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    return {**dims, **encoder_dims(config), "qkv": 3 * dims["q"], "up": 2 * dims["ff"]}


def _rules(config: Config) -> tuple[Rule, ...]:
    later = range(1, integer(config, "num_hidden_layers"))
    return (
        Rule("token_embd.weight", "model.embeddings.tok_embeddings.weight", ("vocab", "hidden")),
        Rule("token_embd_norm.weight", "model.embeddings.norm.weight", ("hidden",)),
        Rule("output_norm.weight", "model.final_norm.weight", ("hidden",)),
        replace(layer("attn_norm.weight", "attn_norm.weight", "hidden"), layers=later),
        layer("attn_qkv.weight", "attn.Wqkv.weight", "qkv", "hidden"),
        layer("attn_output.weight", "attn.Wo.weight", "hidden", "q"),
        layer("ffn_norm.weight", "mlp_norm.weight", "hidden"),
        layer("ffn_up.weight", "mlp.Wi.weight", "up", "hidden"),
        layer("ffn_down.weight", "mlp.Wo.weight", "hidden", "ff"),
        *(_CLASSIFIER if is_classifier(config) else ()),
    )


def _types(config: Config, layers: int) -> list[str]:
    """Each layer's kind of attention."""
    found = config.get("layer_types")
    if found is None:
        every = integer(config, "global_attn_every_n_layers")
        found = [_WINDOWED if number % every else _FULL for number in range(layers)]
    if len(found) != layers or not set(found) <= {_FULL, _WINDOWED}:
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json is not {layers} times "
            f"{_FULL} or {_WINDOWED}"
        )
    return list(found)


def _rope(config: Config, kind: str) -> Rope:
    # Older files have names of their own for the two bases.
    theta = {_FULL: "global_rope_theta", _WINDOWED: "local_rope_theta"}[kind]
    return read_layer_rope(config, kind, theta, ("default",))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    windowed = rope_keys(_rope(config, _WINDOWED))
    keys = {
        **decoder_keys(config, dims, epsilon="norm_eps", key=EPSILON),
        **rope_keys(_rope(config, _FULL)),
        "rope.freq_base_swa": windowed["rope.freq_base"],
        "rope.scaling.type": text("none"),
        "attention.sliding_window": u32(integer(config, "local_attention")),
        "attention.sliding_window_pattern": array(
            "bool", [kind == _WINDOWED for kind in _types(config, dims["layers"])]
        ),
        "hidden_activation": text(str(config["hidden_activation"])),
        **encoder_keys(config, dims),
    }
    if is_classifier(config):
        keys["classifier.pooling_type"] = u32(_POOLINGS[config["classifier_pooling"]])
    return keys


def _config(header: Header) -> dict[str, Any]:
    pattern = header.keys.get("attention.sliding_window_pattern", [])
    pooling = {number: name for name, number in _POOLINGS.items()}
    rope = rope_config(header)
    local = header.keys.get("rope.freq_base_swa", rope["rope_theta"])
    return {
        **classifier_config(header, "ModernBert"),
        "model_type": "modernbert",
        **header.named(
            hidden_size="embedding_length",
            num_hidden_layers="block_count",
            intermediate_size="feed_forward_length",
            max_position_embeddings="context_length",
            num_attention_heads="attention.head_count",
            norm_eps=EPSILON,
            local_attention="attention.sliding_window",
            hidden_activation="hidden_activation",
        ),
        "layer_types": [_WINDOWED if w else _FULL for w in pattern],
        "rope_parameters": {_FULL: rope, _WINDOWED: {**rope, "rope_theta": local}},
        "classifier_pooling": pooling.get(header.keys.get("classifier.pooling_type", 1), "mean"),
    }


MODERN_BERT = Architecture(
    name="modern-bert",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    read_notes=lambda config: exact_gelu_note(config, config["hidden_activation"]),
    defaults={
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "local_attention": 128,
        "global_attn_every_n_layers": _EVERY,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "hidden_activation": "gelu",
        "classifier_pooling": "cls",
    },
    fixed={
        "hidden_activation": ("gelu", "silu"),
        "classifier_activation": ("gelu",),
        "classifier_pooling": tuple(_POOLINGS),
        "norm_bias": (False,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "classifier_bias": (False,),
    },
    renames=((r"^(?=(embeddings|layers|final_norm)\.)", "model."),),
    ignored=(r"(head|decoder)\..*",),
    published=((r"^model\.", ""),),
    loads_packed=False,
)
MODERN_BERT_CLASSIFIER = replace(MODERN_BERT, ignored=(), published=())
