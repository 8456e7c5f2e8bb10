"""Nomic's BERT and Jina's third embedder: encoders that are rotated; "nomic-bert", "jina-bert-v3".

Nomic's MLP is gated and nothing has a bias; Jina's is BERT's with biases. Both hold q, k and v in
one matrix. Nomic's own config.json has GPT-2's names for the sizes, transformers' has BERT's.

Refused: Nomic's mixture of experts, norms before the attention, and Jina's adapters for tasks.
Sources: arXiv:2402.01613, arXiv:2409.10173, transformers' modeling_nomic_bert.py and
modeling_jina_embeddings_v3.py, llama.cpp's src/models/bert.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, integer, number
from quantcli.archs.decoder import (
    EPSILON,
    attention_dims,
    biased,
    check_square,
    decoder_config,
    decoder_keys,
    exact_gelu_note,
)
from quantcli.archs.encoder import encoder_keys
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue


def _layer(name: str, source: str, *shape: str) -> Rule:
    return Rule(f"blk.{{i}}.{name}.weight", f"encoder.layers.{{i}}.{source}.weight", shape)


_EMBEDDINGS = (
    Rule("token_embd.weight", "embeddings.word_embeddings.weight", ("vocab", "hidden")),
    Rule("token_types.weight", "embeddings.token_type_embeddings.weight", ("types", "hidden")),
    *biased(Rule("token_embd_norm.weight", "emb_ln.weight", ("hidden",))),
)
_NORMS = biased(
    _layer("attn_output_norm", "norm1", "hidden"),
    _layer("layer_output_norm", "norm2", "hidden"),
)
_NOMIC = (
    *_EMBEDDINGS,
    *_NORMS,
    _layer("attn_qkv", "attn.Wqkv", "qkv", "hidden"),
    _layer("attn_output", "attn.out_proj", "hidden", "q"),
    _layer("ffn_up", "mlp.fc11", "ff", "hidden"),
    _layer("ffn_gate", "mlp.fc12", "ff", "hidden"),
    _layer("ffn_down", "mlp.fc2", "hidden", "ff"),
)
_JINA = (
    *_EMBEDDINGS,
    *_NORMS,
    *biased(
        _layer("attn_qkv", "mixer.Wqkv", "qkv", "hidden"),
        _layer("attn_output", "mixer.out_proj", "hidden", "q"),
        _layer("ffn_up", "mlp.fc1", "ff", "hidden"),
        _layer("ffn_down", "mlp.fc2", "hidden", "ff"),
    ),
)
_IGNORED = (
    r"embeddings\.(position_ids|token_type_ids)",
    r".*\.rotary(_emb)?\.inv_freq",
    r"pooler\.dense\.(weight|bias)",
    r"(cls|lm_head)\..*",
)
_TRAINED = 2048
"""Tokens of Nomic's training, whose config.json names the longer texts of its own scaling."""


def _settled(config: Config) -> dict[str, Any]:
    """The configuration under transformers' names."""
    if "n_embd" not in config:
        return dict(config)
    return {
        **config,
        "hidden_size": config["n_embd"],
        "num_hidden_layers": integer(config, "n_layer"),
        "num_attention_heads": integer(config, "n_head"),
        "intermediate_size": integer(config, "n_inner"),
        "layer_norm_eps": number(config, "layer_norm_epsilon"),
        "max_position_embeddings": integer(config, "max_trained_positions", default=_TRAINED),
        "rope_theta": number(config, "rotary_emb_base"),
    }


def _rope(config: Config) -> Rope:
    return read_rope(config, ("default",))


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(_settled(config))
    return {**dims, "qkv": 3 * dims["q"], "types": integer(config, "type_vocab_size")}


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    settled = _settled(config)
    return {
        **decoder_keys(settled, dims, epsilon="layer_norm_eps", key=EPSILON),
        **rope_keys(_rope(settled)),
        **encoder_keys(config, dims),
    }


def _config(header: Header, model: str, model_type: str) -> dict[str, Any]:
    config = decoder_config(header, model, model_type, epsilon="layer_norm_eps", key=EPSILON)
    config.pop("num_key_value_heads", None)
    if model_type != "nomic_bert":
        config.pop("head_dim", None)
    return {**config, "type_vocab_size": header.shapes.get("token_types.weight", (1,))[0]}


NOMIC_BERT = Architecture(
    name="nomic-bert",
    read_dims=_dims,
    read_rules=lambda config: _NOMIC,
    to_keys=_keys,
    to_config=lambda header: _config(header, "NomicBertModel", "nomic_bert"),
    check=check_square,
    defaults={
        "hidden_act": "silu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": _TRAINED,
        "rope_theta": 1000.0,
        "type_vocab_size": 2,
    },
    fixed={
        "hidden_act": ("silu",),
        "activation_function": ("swiglu",),
        "prenorm": (False,),
        "causal": (False,),
        "qkv_proj_bias": (False,),
        "mlp_fc1_bias": (False,),
        "mlp_fc2_bias": (False,),
        "rotary_emb_fraction": (1.0, 1),
        "rotary_emb_interleaved": (False,),
        "rotary_emb_scale_base": (),
        "moe_every_n_layers": (0, -1),
    },
    renames=((r"^(nomic_)?bert\.", ""),),
    ignored=_IGNORED,
    loads_packed=False,
)
JINA_V3 = replace(
    NOMIC_BERT,
    name="jina-bert-v3",
    read_rules=lambda config: _JINA,
    to_config=lambda header: _config(header, "JinaEmbeddingsV3Model", "jina_embeddings_v3"),
    read_notes=lambda config: exact_gelu_note(config, config["hidden_act"]),
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 8194,
        "rope_theta": 20000.0,
        "type_vocab_size": 1,
    },
    fixed={"hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh")},
    renames=((r"^(roberta|jina_embeddings_v3)\.", ""),),
)
