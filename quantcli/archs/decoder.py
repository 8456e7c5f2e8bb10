"""What the decoders after Llama have in common: grouped-query attention, RMSNorm, gated MLP.

Families put their tables together from these parts; names on the left are llama.cpp's, on the
right transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantcli.archs.config import Config, class_name, flag, integer, number
from quantcli.archs.header import Header
from quantcli.archs.rope import Rope, rope_config
from quantcli.archs.rules import Dims, Part, Rule, Share
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, f32, u32


def layer(name: str, source: str, *shape: str, rotary: str | None = None) -> Rule:
    """A rule for a tensor of every layer."""
    return Rule(f"blk.{{i}}.{name}", f"model.layers.{{i}}.{source}", shape, rotary)


EMBEDDING = Rule("token_embd.weight", "model.embed_tokens.weight", ("vocab", "hidden"))
OUTPUT_NORM = Rule("output_norm.weight", "model.norm.weight", ("hidden",))
OUTPUT = Rule("output.weight", "lm_head.weight", ("vocab", "hidden"))

NORMS = (
    layer("attn_norm.weight", "input_layernorm.weight", "hidden"),
    layer("ffn_norm.weight", "post_attention_layernorm.weight", "hidden"),
)
ATTENTION = (
    layer("attn_q.weight", "self_attn.q_proj.weight", "q", "hidden"),
    layer("attn_k.weight", "self_attn.k_proj.weight", "kv", "hidden"),
    layer("attn_v.weight", "self_attn.v_proj.weight", "kv", "hidden"),
    layer("attn_output.weight", "self_attn.o_proj.weight", "hidden", "q"),
)
HEAD_NORMS = (
    layer("attn_q_norm.weight", "self_attn.q_norm.weight", "head_dim"),
    layer("attn_k_norm.weight", "self_attn.k_norm.weight", "head_dim"),
)
MLP = (
    layer("ffn_gate.weight", "mlp.gate_proj.weight", "ff", "hidden"),
    layer("ffn_up.weight", "mlp.up_proj.weight", "ff", "hidden"),
    layer("ffn_down.weight", "mlp.down_proj.weight", "hidden", "ff"),
)


def gated_mlp(block: str, ending: str = "", size: str = "ff") -> tuple[Rule, ...]:
    """`MLP` under another ``block``: a dense layer's, or "_shexp", that of a shared expert."""
    return tuple(
        replace(
            rule,
            name=rule.name.replace(".weight", f"{ending}.weight"),
            source=rule.source.replace("mlp.", f"{block}."),
            shape=tuple(size if dim == "ff" else dim for dim in rule.shape),
        )
        for rule in MLP
    )


def experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Router and experts of a mixture under ``block``, whose three matrices have these names.

    Published checkpoints hold each expert's matrices apart; transformers 5 keeps them stacked
    in memory, with gate above up, and writes that when asked not to restore the old layout.
    """
    inside = f"{block}.experts"
    halves = f"model.layers.{{i}}.{inside}.gate_up_proj"
    whole = f"model.layers.{{i}}.{inside}.down_proj"
    wide, narrow = ("experts", "expert_ff", "hidden"), ("experts", "hidden", "expert_ff")
    parts = (
        ("ffn_gate_exps", gate, wide, Share(halves, 0, 2)),
        ("ffn_up_exps", up, wide, Share(halves, 1, 2)),
        ("ffn_down_exps", down, narrow, Share(whole)),
    )
    return (
        layer("ffn_gate_inp.weight", f"{block}.gate.weight", "experts", "hidden"),
        *(
            replace(layer(f"{name}.weight", f"{inside}.{{e}}.{matrix}.weight", *shape), fused=share)
            for name, matrix, shape, share in parts
        ),
    )


def output(config: Config) -> Rule:
    """The output matrix, which need not be there if it is tied to the embeddings.

    transformers unties the two when a checkpoint holds both and they differ, so one that is
    there is written in any case; without it llama.cpp takes the embeddings.
    """
    return replace(OUTPUT, optional=flag(config, "tie_word_embeddings"))


def expert_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """How many experts there are, and how many a token visits."""
    used = integer(config, "num_experts_per_tok")
    if used > dims["experts"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} sends a token to {used} of "
            f"{dims['experts']} experts"
        )
    return {"expert_count": u32(dims["experts"]), "expert_used_count": u32(used)}


def attention_dims(config: Config) -> dict[str, int]:
    """Sizes of embeddings, attention and MLP; ``head_dim`` is derived when it is not given."""
    hidden = integer(config, "hidden_size")
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", default=heads)
    if config.get("head_dim") is None and hidden % heads:
        raise ArchitectureError(
            f"hidden_size {hidden} of {class_name(config)} in config.json is not a multiple of "
            f"num_attention_heads {heads}, and head_dim is not given"
        )
    head_dim = integer(config, "head_dim", default=max(1, hidden // heads))
    if heads % kv_heads or head_dim % 2:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {heads} attention heads of {head_dim} over "
            f"{kv_heads} key-value heads, expected a multiple and an even size"
        )
    return {
        "layers": integer(config, "num_hidden_layers"),
        "vocab": integer(config, "vocab_size"),
        "hidden": hidden,
        "ff": integer(config, "intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "q": heads * head_dim,
        "kv": kv_heads * head_dim,
    }


RMS_EPSILON = "attention.layer_norm_rms_epsilon"
EPSILON = "attention.layer_norm_epsilon"
"""Keys of an RMSNorm's and a LayerNorm's epsilon."""


def decoder_keys(
    config: Config, dims: Dims, *, epsilon: str = "rms_norm_eps", key: str = RMS_EPSILON
) -> dict[str, MetaValue]:
    """The key-values that every family with grouped-query attention has.

    ``epsilon`` is config.json's name of the norms' epsilon, ``key`` GGUF's.
    """
    return {
        "vocab_size": u32(dims["vocab"]),
        "context_length": u32(integer(config, "max_position_embeddings")),
        "embedding_length": u32(dims["hidden"]),
        "block_count": u32(dims["layers"]),
        "feed_forward_length": u32(dims["ff"]),
        "attention.head_count": u32(dims["heads"]),
        "attention.head_count_kv": u32(dims["kv_heads"]),
        "attention.key_length": u32(dims["head_dim"]),
        "attention.value_length": u32(dims["head_dim"]),
        key: f32(number(config, epsilon)),
    }


def decoder_config(
    header: Header,
    model: str,
    model_type: str,
    *,
    epsilon: str = "rms_norm_eps",
    key: str = RMS_EPSILON,
) -> dict[str, Any]:
    """`decoder_keys` and the one rotation's keys read backwards, for the class ``model``."""
    return {
        "architectures": [model],
        "model_type": model_type,
        **header.named(
            hidden_size="embedding_length",
            num_hidden_layers="block_count",
            intermediate_size="feed_forward_length",
            max_position_embeddings="context_length",
            num_attention_heads="attention.head_count",
            num_key_value_heads="attention.head_count_kv",
            head_dim="attention.key_length",
            **{epsilon: key},
        ),
        "rope_parameters": rope_config(header),
    }


def partial_rotation(rope: Rope, dims: Dims) -> int:
    """How many values of each head are rotated, by ``partial_rotary_factor``."""
    share = number(rope, "partial_rotary_factor", default=1.0)
    rotated = int(dims["head_dim"] * share)
    if not 0 < rotated <= dims["head_dim"] or rotated % 2:
        raise ArchitectureError(
            f"config.json sets partial_rotary_factor to {share:g}, which rotates {rotated} of the "
            f"{dims['head_dim']} values of a head of {class_name(rope)}"
        )
    return rotated


def partial_config(config: Mapping[str, Any], header: Header) -> dict[str, Any]:
    """The rotation's parameters with the share of a head that is rotated."""
    rope = dict(config["rope_parameters"])
    if "rope.dimension_count" in header.keys and config.get("head_dim"):
        rope["partial_rotary_factor"] = header.keys["rope.dimension_count"] / config["head_dim"]
    return rope


def biased(*rules: Rule) -> tuple[Rule, ...]:
    """The rules, each followed by one for the bias beside its weight."""
    biases = (
        replace(
            rule,
            name=rule.name.removesuffix("weight") + "bias",
            source=rule.source.removesuffix("weight") + "bias",
            shape=rule.shape[:1],
            pointwise=None,
        )
        for rule in rules
    )
    return tuple(rule for pair in zip(rules, biases, strict=True) for rule in pair)


def by_heads(*rules: Rule) -> tuple[Rule, ...]:
    """Rules for fused q, k and v that the checkpoint holds head by head, (heads, 3, head_dim)."""
    view = ("heads", 3, "head_dim")
    return tuple(
        replace(rule, parts=(Part((*view, *rule.shape[1:]), (1, 0, 2, 3)[: 2 + len(rule.shape)]),))
        for rule in rules
    )


def check_square(config: Config, dims: Dims) -> None:
    """Refuse heads that do not fill the hidden size, where llama.cpp takes it for granted."""
    if dims["q"] != dims["hidden"]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {dims['heads']} heads of "
            f"{dims['head_dim']}, but llama.cpp needs them to fill hidden_size {dims['hidden']}"
        )


def exact_gelu_note(config: Config, activation: object) -> tuple[str, ...]:
    """A note if the ``activation`` is the exact GELU, where llama.cpp's graph approximates it."""
    if activation != "gelu":
        return ()
    return (
        f"{class_name(config)} computes GELU by the error function, llama.cpp by its tanh "
        "approximation, which is off by 5e-4 at most",
    )


def unwindowed_note(config: Config) -> tuple[str, ...]:
    """A note if the model has a sliding window that llama.cpp's graph does not apply."""
    window, context = config.get("sliding_window"), integer(config, "max_position_embeddings")
    if not isinstance(window, int) or window >= context:
        return ()
    return (
        f"{class_name(config)} was trained with a sliding window of {window} tokens; llama.cpp "
        "lets it attend to the whole context, which differs beyond that length",
    )
