"""Multi-head latent attention: keys and values out of one short vector a token.

A token's input is projected to a latent vector and a rotated part that all heads share; each
head's keys and values are projections of the latent. llama.cpp turns this round: keys' projection
is applied to the query instead (attn_k_b, each head's transposed), so that the latent itself is
what it attends to, as one key-value head; values' projection (attn_v_b) follows the attention.
Both lie in the checkpoint's kv_b_proj, head by head. Queries may pass a latent of their own.

transformers stores the rotated parts with neighbours as pairs, as ggml rotates them, so no row
moves; its norms of the latents have an epsilon of 1e-6 whatever ``rms_norm_eps`` is.

Of YaRN llama.cpp computes for these models the form that DeepSeek publishes: nothing is scaled
but the scores, by the square of 1 + 0.1 * mscale_all_dim * ln(factor). It takes the paper's
beta_fast and beta_slow, unless they are given on its command line, as a note then says.

Sources: arXiv:2405.04434, transformers' modeling_deepseek_v3.py, llama.cpp's
src/models/deepseek2.cpp and llama-context.cpp.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from quantcli.archs import mixture
from quantcli.archs.config import Config, class_name, flag, integer, number, positive
from quantcli.archs.decoder import RMS_EPSILON, layer
from quantcli.archs.fold import VALUES, FoldRule, Folds
from quantcli.archs.header import Header, shortest
from quantcli.archs.rope import Rope, read_rope, rope_config
from quantcli.archs.rules import Dims, Outputs, Part, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, f32, text, u32

_LATENT_EPSILON = 1e-6
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
_LITE_LAYERS = (26, 27)
_LITE_SIZES = ((48, 128256),)
"""Layers, or layers and tokens, of DeepSeek V2-Lite, GigaChat 3 and Kanana 2."""
_LOG_MULTIPLIER = 0.1
"""The key holds a tenth of mscale_all_dim."""

_DIRECT = layer("attn_q.weight", "self_attn.q_proj.weight", "q", "hidden")
_LATENT = (
    layer("attn_q_a.weight", "self_attn.q_a_proj.weight", "q_rank", "hidden"),
    layer("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight", "q_rank"),
    layer("attn_q_b.weight", "self_attn.q_b_proj.weight", "q", "q_rank"),
)
COMPRESSION = (
    layer("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight", "kv_a", "hidden"),
    layer("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight", "rank"),
)
_VIEW = ("heads", "kv_head", "rank")
_KEYS = replace(
    layer("attn_k_b.weight", "self_attn.kv_b_proj.weight", "heads", "rank", "nope"),
    stored=("kv_b", "rank"),
    parts=(Part(_VIEW, axes=(0, 2, 1), cut=((1, 0, "nope"),)),),
)
_VALUES = replace(
    layer("attn_v_b.weight", "self_attn.kv_b_proj.weight", "heads", "v_head", "rank"),
    stored=("kv_b", "rank"),
    parts=(Part(_VIEW, cut=((1, "nope", "kv_head"),)),),
)
EXPANSION = layer("attn_kv_b.weight", "self_attn.kv_b_proj.weight", "kv_b", "rank")
"""Whole, as llama.cpp's older form has it."""
OUTPUT = layer("attn_output.weight", "self_attn.o_proj.weight", "hidden", "o")

FOLDS = Folds(
    rules=(
        FoldRule(
            "norm",
            ("blk.{i}.attn_norm",),
            ("blk.{i}.attn_q", "blk.{i}.attn_q_a", "blk.{i}.attn_kv_a_mqa"),
        ),
        FoldRule("norm", ("blk.{i}.attn_q_a_norm",), ("blk.{i}.attn_q_b",), stream=False),
        replace(VALUES, producers=("blk.{i}.attn_v_b",)),
        *(rule for rule in mixture.FOLDS.rules[1:] if rule.kind != "values"),
    ),
    writers=mixture.FOLDS.writers,
    basis="",
    apart=("blk.{i}.attn_k_b", "blk.{i}.attn_v_b"),
)


def mla_dims(config: Config) -> dict[str, int]:
    """Sizes of embeddings, latent attention and MLP; "q_rank" only where queries have a latent."""
    heads = integer(config, "num_attention_heads")
    if integer(config, "num_key_value_heads", default=heads) != heads:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {config['num_key_value_heads']} key-value "
            f"heads for {heads}, but latent attention makes one for each"
        )
    rank = integer(config, "kv_lora_rank")
    nope, rope = integer(config, "qk_nope_head_dim"), integer(config, "qk_rope_head_dim")
    value = integer(config, "v_head_dim")
    if rope % 2:
        raise ArchitectureError(
            f"qk_rope_head_dim of {class_name(config)} in config.json is {rope}, "
            "expected an even number"
        )
    latent = {"q_rank": integer(config, "q_lora_rank")} if has_query_latent(config) else {}
    return {
        "layers": integer(config, "num_hidden_layers"),
        "vocab": integer(config, "vocab_size"),
        "hidden": integer(config, "hidden_size"),
        "ff": integer(config, "intermediate_size"),
        "heads": heads,
        "rank": rank,
        "nope": nope,
        "rope": rope,
        "v_head": value,
        "q": heads * (nope + rope),
        "kv_a": rank + rope,
        "kv_head": nope + value,
        "kv_b": heads * (nope + value),
        "o": heads * value,
        **latent,
    }


def check_lite(config: Config, dims: Dims) -> None:
    """Refuse a query latent in a model that llama.cpp takes for one without, by its size."""
    layers, vocab = dims["layers"], dims["vocab"]
    lite = layers in _LITE_LAYERS or (layers, vocab) in _LITE_SIZES
    if lite and has_query_latent(config):
        raise ArchitectureError(
            f"config.json of {class_name(config)} has a q_lora_rank, but llama.cpp takes a model "
            f"of {layers} layers and {vocab} tokens for one without"
        )


def has_query_latent(config: Config) -> bool:
    """Whether queries pass a latent vector too; a rank of 0 or null says no."""
    return bool(config.get("q_lora_rank"))


def query_rules(config: Config) -> tuple[Rule, ...]:
    """The queries' projection, or both with the norm between them."""
    return _LATENT if has_query_latent(config) else (_DIRECT,)


def mla_rules(config: Config) -> tuple[Rule, ...]:
    """Attention with the expansion apart, as llama.cpp applies it."""
    queries = query_rules(config)
    keys = replace(_KEYS, fed_by=Outputs(queries[-1].source, "heads", 0, "nope"))
    return (*queries, *COMPRESSION, keys, _VALUES, OUTPUT)


def mla_keys(config: Config, dims: Dims, rope: Rope | None = None) -> dict[str, MetaValue]:
    """The key-values of latent attention, which llama.cpp takes for one key-value head.

    ``rope`` is `mla_rope`'s where none is given.
    """
    return {
        "vocab_size": u32(dims["vocab"]),
        "context_length": u32(integer(config, "max_position_embeddings")),
        "embedding_length": u32(dims["hidden"]),
        "block_count": u32(dims["layers"]),
        "feed_forward_length": u32(dims["ff"]),
        "attention.head_count": u32(dims["heads"]),
        "attention.head_count_kv": u32(1),
        "attention.key_length": u32(dims["kv_a"]),
        "attention.value_length": u32(dims["rank"]),
        "attention.key_length_mla": u32(dims["nope"] + dims["rope"]),
        "attention.value_length_mla": u32(dims["v_head"]),
        "attention.kv_lora_rank": u32(dims["rank"]),
        # 0 tells llama.cpp of a model without, in place of guessing it from the layers' number.
        "attention.q_lora_rank": u32(dims.get("q_rank", 0)),
        RMS_EPSILON: f32(number(config, "rms_norm_eps")),
        "rope.dimension_count": u32(dims["rope"]),
        **_rope_keys(mla_rope(config) if rope is None else rope),
    }


def mla_config(header: Header, model: str, model_type: str) -> dict[str, Any]:
    """`mla_keys` read backwards, for the class ``model``."""
    keys = header.keys
    rotated = keys.get("rope.dimension_count", 0)
    rope = rope_config(header)
    if rope["rope_type"] == "yarn":
        mscale = shortest(keys.get("rope.scaling.yarn_log_multiplier", 0.0) / _LOG_MULTIPLIER)
        rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    return {
        "architectures": [model],
        "model_type": model_type,
        **header.named(
            hidden_size="embedding_length",
            num_hidden_layers="block_count",
            intermediate_size="feed_forward_length",
            max_position_embeddings="context_length",
            num_attention_heads="attention.head_count",
            num_key_value_heads="attention.head_count",
            kv_lora_rank="attention.kv_lora_rank",
            v_head_dim="attention.value_length_mla",
            rms_norm_eps=RMS_EPSILON,
        ),
        "q_lora_rank": keys.get("attention.q_lora_rank") or None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys.get("attention.key_length_mla", 0) - rotated,
        "rope_parameters": rope,
    }


def mla_rope(config: Config) -> Rope:
    """The rotation of the shared part."""
    return read_rope(config, ("default", "yarn"))


def mla_notes(config: Config, rope: Rope | None = None) -> tuple[str, ...]:
    """Notes on other betas of yarn and another epsilon than llama.cpp computes with."""
    notes = []
    rope = mla_rope(config) if rope is None else rope
    if rope["rope_type"] == "yarn":
        for key, usual in _BETAS.items():
            found = number(rope, key, default=usual)
            if found != usual:
                option = f"--yarn-{key.replace('_', '-')} {found:g}"
                notes.append(
                    f"config.json sets {key} of yarn to {found:g}, which llama.cpp does not read "
                    f"from a GGUF of {class_name(config)}: run it with {option}"
                )
    epsilon = number(config, "rms_norm_eps")
    if epsilon != _LATENT_EPSILON:
        notes.append(
            f"transformers computes the norms of {class_name(config)}'s latent vectors with an "
            f"epsilon of {_LATENT_EPSILON:g}, llama.cpp with rms_norm_eps, which is {epsilon:g}"
        )
    return tuple(notes)


def _rope_keys(rope: Rope) -> dict[str, MetaValue]:
    keys = {"rope.freq_base": f32(positive(rope, "rope_theta"))}
    if rope["rope_type"] == "default":
        return keys
    factor = positive(rope, "factor")
    mscale = number(rope, "mscale_all_dim", default=0.0)
    scaled = _attention_factor(rope, factor)
    if mscale <= 0 or not math.isclose(scaled, 1.0, rel_tol=1e-6):
        raise ArchitectureError(
            f"config.json scales the rotation of {class_name(rope)} by {scaled:g} with yarn's "
            f"mscale_all_dim at {mscale:g}, but llama.cpp computes it with the same number above "
            "0 for mscale and mscale_all_dim only"
        )
    if not flag(rope, "truncate", True):
        raise ArchitectureError(
            "config.json sets truncate of yarn to false, but llama.cpp computes "
            f"{class_name(rope)} with true only"
        )
    return {
        **keys,
        "rope.scaling.type": text("yarn"),
        "rope.scaling.factor": f32(factor),
        "rope.scaling.original_context_length": u32(
            integer(rope, "original_max_position_embeddings", "max_position_embeddings")
        ),
        "rope.scaling.yarn_log_multiplier": f32(_LOG_MULTIPLIER * mscale),
    }


def _attention_factor(rope: Rope, factor: float) -> float:
    """What transformers multiplies the rotated parts by."""
    given = number(rope, "attention_factor", default=0.0)
    if given:
        return given

    def scale(multiplier: float) -> float:
        return 1 + 0.1 * multiplier * math.log(factor) if factor > 1 else 1.0

    mscale, all_dim = (number(rope, key, default=0.0) for key in ("mscale", "mscale_all_dim"))
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)
