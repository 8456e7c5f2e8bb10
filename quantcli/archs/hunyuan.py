"""Hunyuan, dense (0.5B to 7B) and with experts (A13B): "hunyuan-dense" and "hunyuan-moe".

Norms on each head of q and k come after the rotation. Rope type "dynamic" with an ``alpha``
stretches the rotation's base once, for all lengths, so that GGUF holds the stretched base, and the
way back gives it as an ordinary one. Each layer of the mixture has a shared MLP beside the experts,
of the same size; config.json may list the sizes and counts by layer, where they are all equal.

Sources: Tencent's model cards, transformers' modeling_hunyuan_v1_dense.py and
modeling_hunyuan_v1_moe.py, llama.cpp's src/models/hunyuan-vl.cpp and hunyuan-moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    expert_keys,
    experts,
    gated_mlp,
    layer,
    output,
)
from quantcli.archs.fold import DECODER, Folds
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_HEAD_NORMS = (
    layer("attn_q_norm.weight", "self_attn.query_layernorm.weight", "head_dim"),
    layer("attn_k_norm.weight", "self_attn.key_layernorm.weight", "head_dim"),
)
_EXPERTS = tuple(
    replace(rule, source=rule.source.replace("mlp.gate.weight", "mlp.gate.wg.weight"))
    for rule in experts("mlp", "gate_proj", "up_proj", "down_proj")
)
_SHARED = gated_mlp("mlp.shared_mlp", "_shexp")


def _alike(config: Config, key: str, default: int | None = None) -> int:
    """A count that may be listed by layer."""
    found = config.get(key)
    if isinstance(found, list) and found:
        if len(set(map(str, found))) > 1:
            raise ArchitectureError(
                f"{key} of {class_name(config)} in config.json differs by layer, which llama.cpp "
                "does not compute"
            )
        return integer({**config, key: found[0]}, key)
    return integer(config, key, default=default)


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *ATTENTION, *_HEAD_NORMS, *MLP)


def _mixture_rules(config: Config) -> tuple[Rule, ...]:
    return (
        EMBEDDING, OUTPUT_NORM, output(config),
        *NORMS, *ATTENTION, *_HEAD_NORMS, *_EXPERTS, *_SHARED,
    )  # fmt: skip


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = read_rope(config, ("default", "ntk_alpha", "linear"))
    return {**decoder_keys(config, dims), **rope_keys(rope, head_dim=dims["head_dim"])}


def _mixture_dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    counts = {"moe_intermediate_size": dims["ff"], "num_shared_expert": 1}
    for key, supported in counts.items():
        found = _alike(config, key, supported)
        if found != supported:
            raise ArchitectureError(
                f"config.json of {class_name(config)} sets {key} to {found}, but llama.cpp "
                f"computes it with {supported} only"
            )
    return {**dims, "experts": _alike(config, "num_experts"), "expert_ff": dims["ff"]}


def _mixture_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    used = {"num_experts_per_tok": _alike(config, "moe_topk")}
    return {
        **_keys(config, dims),
        **expert_keys({**config, **used}, dims),
        "expert_feed_forward_length": u32(dims["ff"]),
        "expert_shared_feed_forward_length": u32(dims["ff"]),
        "expert_shared_count": u32(1),
    }


def _config(header: Header) -> dict[str, Any]:
    return decoder_config(header, "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense")


def _mixture_config(header: Header) -> dict[str, Any]:
    return {
        **decoder_config(header, "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe"),
        **header.named(num_experts="expert_count", moe_topk="expert_used_count"),
    }


HUNYUAN = Architecture(
    name="hunyuan-dense",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    fixed={
        "hidden_act": ("silu", "swish"),
        "use_qk_norm": (True,),
        "use_cla": (False,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "num_experts": (1,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=DECODER,
)

HUNYUAN_MOE = replace(
    HUNYUAN,
    name="hunyuan-moe",
    read_dims=_mixture_dims,
    read_rules=_mixture_rules,
    to_keys=_mixture_keys,
    to_config=_mixture_config,
    fixed={key: value for key, value in HUNYUAN.fixed.items() if key != "num_experts"},
    folds=Folds(),
)
