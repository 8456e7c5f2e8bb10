"""T5, Flan-T5 and mT5: an encoder and a decoder; llama.cpp's "t5", and "t5encoder" alone.

Attention adds a bias by the distance of two tokens, which one layer of each half holds for all;
UMT5's layers have one each. The first T5 scales what its head sees, the later ones do not;
llama.cpp never does, so the scale is put into the norm before the head.

Refused: activations besides ReLU and the gated GELU, distances beyond 128, more layers in the
decoder than in the encoder (llama.cpp ends there), and UMT5's decoder.
Sources: arXiv:1910.10683, arXiv:2010.11934, transformers' modeling_t5.py and modeling_umt5.py,
llama.cpp's src/models/t5.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, check_fixed, class_name, integer, number
from quantcli.archs.decoder import EPSILON, RMS_EPSILON
from quantcli.archs.header import Header
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.pieces import Multiply
from quantcli.types import MetaValue, boolean, f32, u32

_GATED = "gated-gelu"


def _attention(half: str, prefix: str, place: int, kind: str) -> tuple[Rule, ...]:
    """Norm and matrices of an attention, sublayer ``place`` of the blocks of a half."""
    source = f"{half}oder.block.{{i}}.layer.{place}."
    rules = [
        Rule(f"{half}.blk.{{i}}.{prefix}_norm.weight", f"{source}layer_norm.weight", ("hidden",))
    ]
    rules += [
        Rule(f"{half}.blk.{{i}}.{prefix}_{x}.weight", f"{source}{kind}.{x}.weight", ("q", "hidden"))
        for x in "qkv"
    ]
    out = Rule(f"{half}.blk.{{i}}.{prefix}_o.weight", f"{source}{kind}.o.weight", ("hidden", "q"))
    return (*rules, out)


def _bias(half: str) -> Rule:
    return Rule(
        f"{half}.blk.{{i}}.attn_rel_b.weight",
        f"{half}oder.block.{{i}}.layer.0.SelfAttention.relative_attention_bias.weight",
        ("buckets", "heads"),
        layers=(0,),
    )


def _mlp(half: str, place: int, gated: bool) -> tuple[Rule, ...]:
    source = f"{half}oder.block.{{i}}.layer.{place}."
    parts = {"ffn_up": "wi_1", "ffn_gate": "wi_0"} if gated else {"ffn_up": "wi"}
    inside = f"{source}DenseReluDense."
    return (
        Rule(f"{half}.blk.{{i}}.ffn_norm.weight", f"{source}layer_norm.weight", ("hidden",)),
        *(
            Rule(f"{half}.blk.{{i}}.{name}.weight", f"{inside}{part}.weight", ("ff", "hidden"))
            for name, part in parts.items()
        ),
        Rule(f"{half}.blk.{{i}}.ffn_down.weight", f"{inside}wo.weight", ("hidden", "ff")),
    )


_EMBEDDING = Rule("token_embd.weight", "shared.weight", ("vocab", "hidden"))
_OUTPUT = Rule("output.weight", "lm_head.weight", ("vocab", "hidden"), optional=True)
_ENCODER_NORM = Rule("enc.output_norm.weight", "encoder.final_layer_norm.weight", ("hidden",))
_DECODER_NORM = Rule("dec.output_norm.weight", "decoder.final_layer_norm.weight", ("hidden",))


def _dims(config: Config) -> dict[str, int]:
    heads, size = integer(config, "num_heads"), integer(config, "d_kv")
    layers = integer(config, "num_layers")
    return {
        "layers": layers,
        "decoder_layers": integer(config, "num_decoder_layers", default=layers),
        "vocab": integer(config, "vocab_size"),
        "hidden": integer(config, "d_model"),
        "ff": integer(config, "d_ff"),
        "heads": heads,
        "head_dim": size,
        "q": heads * size,
        "buckets": integer(config, "relative_attention_num_buckets"),
    }


def _encoder_rules(config: Config) -> tuple[Rule, ...]:
    layers = _attention("enc", "attn", 0, "SelfAttention")
    mlp = _mlp("enc", 1, config["feed_forward_proj"] == _GATED)
    return (_EMBEDDING, _ENCODER_NORM, *layers, _bias("enc"), *mlp)


def _own_biases_rules(config: Config) -> tuple[Rule, ...]:
    return tuple(
        replace(rule, layers=None) if "attn_rel_b" in rule.name else rule
        for rule in _encoder_rules(config)
    )


def _scale(config: Config) -> float:
    """What the decoder's output is multiplied by."""
    scaled = config.get("scale_decoder_outputs")
    if scaled is None:
        scaled = config["model_type"] == "t5" and config.get("tie_word_embeddings") is not False
    return integer(config, "d_model") ** -0.5 if scaled else 1.0


def _rules(config: Config) -> tuple[Rule, ...]:
    layers = range(_dims(config)["decoder_layers"])
    norm, scale = _DECODER_NORM, _scale(config)
    if scale != 1:
        norm = replace(norm, pointwise=Multiply(scale))
    decoder = (
        *_attention("dec", "attn", 0, "SelfAttention"),
        *_attention("dec", "cross_attn", 1, "EncDecAttention"),
        *_mlp("dec", 2, config["feed_forward_proj"] == _GATED),
    )
    return (
        *_encoder_rules(config),
        _OUTPUT,
        norm,
        *(replace(rule, layers=layers) for rule in decoder),
        _bias("dec"),
    )


def _check_activation(config: Config, dims: Dims) -> None:
    gated = config["feed_forward_proj"] == _GATED
    activation = "gelu_new" if gated else "relu"
    check_fixed(config, {"dense_act_fn": (activation,), "is_gated_act": (gated,)})


def _check(config: Config, dims: Dims) -> None:
    _check_activation(config, dims)
    if dims["decoder_layers"] > dims["layers"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {dims['decoder_layers']} decoder layers, but "
            f"llama.cpp takes no more than the {dims['layers']} of the encoder"
        )


def _encoder_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    epsilon = f32(number(config, "layer_norm_epsilon"))
    return {
        "vocab_size": u32(dims["vocab"]),
        "context_length": u32(integer(config, "n_positions")),
        "embedding_length": u32(dims["hidden"]),
        "block_count": u32(dims["layers"]),
        "feed_forward_length": u32(dims["ff"]),
        "attention.head_count": u32(dims["heads"]),
        "attention.key_length": u32(dims["head_dim"]),
        "attention.value_length": u32(dims["head_dim"]),
        EPSILON: epsilon,
        RMS_EPSILON: epsilon,
        "attention.relative_buckets_count": u32(dims["buckets"]),
    }


def _alone_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {**_encoder_keys(config, dims), "attention.causal": boolean(False)}


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    start = config.get("decoder_start_token_id")
    pad = config.get("pad_token_id")
    return {
        **_encoder_keys(config, dims),
        "decoder_block_count": u32(dims["decoder_layers"]),
        "decoder_start_token_id": u32(int(start if start is not None else pad or 0)),
    }


def _encoder_config(header: Header) -> dict[str, Any]:
    gated = "enc.blk.0.ffn_gate.weight" in header.shapes
    own = "enc.blk.1.attn_rel_b.weight" in header.shapes
    return {
        "architectures": ["UMT5EncoderModel" if own else "T5EncoderModel"],
        "model_type": "umt5" if own else "t5",
        **header.named(
            d_model="embedding_length",
            num_layers="block_count",
            d_ff="feed_forward_length",
            n_positions="context_length",
            num_heads="attention.head_count",
            d_kv="attention.key_length",
            layer_norm_epsilon=RMS_EPSILON,
            relative_attention_num_buckets="attention.relative_buckets_count",
        ),
        "feed_forward_proj": _GATED if gated else "relu",
    }


def _config(header: Header) -> dict[str, Any]:
    return {
        **_encoder_config(header),
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **header.named(
            num_decoder_layers="decoder_block_count",
            decoder_start_token_id="decoder_start_token_id",
        ),
        # The scale is in the norm.
        "scale_decoder_outputs": False,
    }


T5 = Architecture(
    name="t5",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=_check,
    loads_packed=False,
    defaults={
        "model_type": "t5",
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "n_positions": 512,
        "relative_attention_num_buckets": 32,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "pad_token_id": 0,
    },
    fixed={
        "feed_forward_proj": ("relu", _GATED),
        "relative_attention_max_distance": (128,),
    },
    ignored=(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
)
T5_ENCODER = replace(
    T5,
    name="t5encoder",
    read_rules=_encoder_rules,
    to_keys=_alone_keys,
    to_config=_encoder_config,
    check=_check_activation,
    ignored=(*T5.ignored, r"decoder\..*", r"lm_head\..*"),
)
UMT5_ENCODER = replace(T5_ENCODER, read_rules=_own_biases_rules)
