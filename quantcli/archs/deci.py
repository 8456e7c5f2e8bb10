"""DeciLM and NVIDIA's Nemotron 51B, Super 49B and Ultra 253B: Llamas pruned layer by layer; "deci".

Each layer has key-value heads and an MLP of its own size, may have a single matrix in place of its
attention, none at all, or be empty. In GGUF counts of 0 say so.

Refused: an MLP that is left out below an attention (llama.cpp drops that attention as well), a
matrix in place of an MLP, and attention through a window.
Sources: arXiv:2411.19146, the modeling_decilm.py of the checkpoints, llama.cpp's
src/models/deci.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer, positive
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
    output,
)
from quantcli.archs.fold import DECODER, Folds
from quantcli.archs.header import Header
from quantcli.archs.rope import llama3_factors, llama3_rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule, Values
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, u32

_ROPE_TYPES = ("default", "linear", "llama3")
_MULTIPLE = 256
"""Heights of MLPs are rounded up to it."""
_ROTATED = (
    replace(ATTENTION[0], rotary="heads"),
    replace(ATTENTION[1], rotary="kv_heads"),
    *ATTENTION[2:],
)
_LINEAR = layer("attn_output.weight", "self_attn.linear_attn.weight", "hidden", "hidden")


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's counts: no ``heads`` without attention, no ``kv_heads`` where it is a matrix."""

    heads: int
    kv_heads: int
    ff: int


def _layers(config: Config) -> list[_Layer]:
    count, heads = integer(config, "num_hidden_layers"), integer(config, "num_attention_heads")
    blocks, each = config.get("block_configs"), config.get("num_key_value_heads_per_layer")
    if isinstance(blocks, list) and len(blocks) == count:
        return [_block(config, block, heads) for block in blocks]
    if (
        isinstance(each, list)
        and len(each) == count
        and all(n in range(1, heads + 1) for n in each)
    ):
        ff = integer(config, "intermediate_size")
        return [_Layer(heads, number, ff) for number in each]
    raise ArchitectureError(
        f"config.json of {class_name(config)} needs block_configs or num_key_value_heads_per_layer "
        f"with an entry for each of {count} layers"
    )


def _block(config: Config, block: Any, heads: int) -> _Layer:
    found = block if isinstance(block, Mapping) else {}
    parts = [part for part in map(found.get, ("attention", "ffn")) if isinstance(part, Mapping)]
    if len(parts) != 2:
        raise ArchitectureError(
            f"block_configs of {class_name(config)} in config.json has the entry {block!r}, "
            "expected an object with attention and ffn"
        )
    attention, mlp = ({**part, "architectures": config["architectures"]} for part in parts)
    for part, key in ((attention, "window_length"), (attention, "sparsify"), (mlp, "sparsify")):
        if part.get(key):
            raise ArchitectureError(
                f"block_configs in config.json sets {key} to {part[key]!r}, which llama.cpp does "
                f"not compute for {class_name(config)}"
            )
    if mlp.get("replace_with_linear"):
        raise ArchitectureError(
            "block_configs in config.json sets replace_with_linear for an MLP, which llama.cpp "
            f"does not compute for {class_name(config)}"
        )
    sharers = attention.get("n_heads_in_group")
    kv_heads = 0 if sharers is None else heads // integer(attention, "n_heads_in_group")
    if kv_heads * (sharers or 0) != heads and sharers is not None:
        raise ArchitectureError(
            f"block_configs of {class_name(config)} in config.json puts {sharers} heads into a "
            f"group, which do not divide the {heads} there are"
        )
    whole = sharers is not None or bool(attention.get("replace_with_linear"))
    ff = 0
    if mlp.get("ffn_mult") is not None:
        ff = int(2 * positive(mlp, "ffn_mult") * integer(config, "hidden_size") / 3)
        ff += -ff % _MULTIPLE
    return _Layer(heads if whole else 0, kv_heads, ff)


def _dims(config: Config) -> dict[str, int]:
    tallest = max(found.ff for found in _layers(config))
    return attention_dims(
        {**config, "num_key_value_heads": None, "intermediate_size": max(1, tallest)}
    )


def _layer_dims(config: Config, layer: int) -> Dims:
    found = _layers(config)[layer]
    size = integer(config, "hidden_size") // integer(config, "num_attention_heads")
    return {"kv_heads": found.kv_heads, "kv": found.kv_heads * size, "ff": found.ff}


def _rules(config: Config) -> tuple[Rule, ...]:
    layers = list(enumerate(_layers(config)))
    attends = [i for i, found in layers if found.kv_heads]
    linear = [i for i, found in layers if found.heads and not found.kv_heads]
    tall = [i for i, found in layers if found.ff]
    return (
        EMBEDDING,
        OUTPUT_NORM,
        output(config),
        replace(NORMS[0], layers=sorted(attends + linear)),
        *(replace(rule, layers=attends) for rule in _ROTATED),
        replace(_LINEAR, layers=linear),
        *(replace(rule, layers=tall) for rule in (NORMS[1], *MLP)),
    )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    layers = _layers(config)
    return {
        **decoder_keys(config, dims),
        "attention.head_count": array("i32", [found.heads for found in layers]),
        "attention.head_count_kv": array("i32", [found.kv_heads for found in layers]),
        "feed_forward_length": array("i32", [found.ff for found in layers]),
        "rope.dimension_count": u32(dims["head_dim"]),
        **rope_keys(read_rope(config, _ROPE_TYPES)),
    }


def _values(config: Config, dims: Dims) -> Values:
    rope = read_rope(config, _ROPE_TYPES)
    if rope["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(rope, dims["head_dim"])}


def _check(config: Config, dims: Dims) -> None:
    check_square(config, dims)
    if not _layers(config)[0].heads:
        raise ArchitectureError(
            f"the first layer of {class_name(config)} has no attention by block_configs in "
            "config.json, and llama.cpp takes the size of all heads from it"
        )
    for number, found in enumerate(_layers(config)):
        if found.kv_heads and found.heads % found.kv_heads:
            raise ArchitectureError(
                f"layer {number} of {class_name(config)} has {found.heads} heads over "
                f"{found.kv_heads} key-value heads by config.json, expected a multiple"
            )
        if found.heads and not found.ff:
            raise ArchitectureError(
                f"layer {number} of {class_name(config)} has attention and no MLP by block_configs "
                "in config.json, and llama.cpp drops the attention of such a layer"
            )


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "DeciLMForCausalLM", "nemotron-nas")
    counts = [config.pop(key) for key in _COUNTED]
    size, hidden = config.pop("head_dim"), config["hidden_size"]
    blocks = [
        {
            "attention": {
                "n_heads_in_group": heads // kv_heads if kv_heads else None,
                "no_op": not heads,
                "replace_with_linear": bool(heads and not kv_heads),
            },
            "ffn": {
                "ffn_mult": 3 * ff / (2 * hidden) if ff else None,
                "no_op": not ff,
                "replace_with_linear": False,
            },
        }
        for heads, kv_heads, ff in zip(*counts, strict=True)
    ]
    config |= {"num_attention_heads": hidden // size, "block_configs": blocks}
    if "rope_freqs.weight" in header.shapes:
        divisors = header.read("rope_freqs.weight").reshape(-1).astype(np.float64)
        config["rope_parameters"] = llama3_rope(divisors, config["rope_parameters"]["rope_theta"])
    return config


_COUNTED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

DECI = Architecture(
    name="deci",
    read_dims=_dims,
    read_layer_dims=_layer_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    read_values=_values,
    check=_check,
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=Folds(
        rules=DECODER.rules,
        writers=DECODER.writers,
        basis="a norm may come before a matrix that stands in place of an attention",
    ),
)
