"""MiniMax-M2: norms over all heads of q and k at once, experts in every layer; "minimax-m2".

The router takes the sigmoid of its scores, always normalised over the chosen experts. Published
files say how much of a head is rotated by ``rotary_dim``. Modules of multi-token prediction, of
which llama.cpp has none for it, are left out.

Sources: MiniMax's model cards, transformers' modeling_minimax_m2.py, llama.cpp's
src/models/minimax-m2.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, integer
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    NORMS,
    OUTPUT,
    OUTPUT_NORM,
    attention_dims,
    decoder_config,
    decoder_keys,
    expert_keys,
    experts,
    layer,
    partial_config,
    partial_rotation,
)
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.mixture import SIGMOID
from quantcli.archs.rope import Rope, read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, u32

_HEAD_NORMS = (
    layer("attn_q_norm.weight", "self_attn.q_norm.weight", "q"),
    layer("attn_k_norm.weight", "self_attn.k_norm.weight", "kv"),
)
_EXPERTS = (
    *experts("block_sparse_moe", "w1", "w3", "w2"),
    layer("exp_probs_b.bias", "block_sparse_moe.e_score_correction_bias", "experts"),
)


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    found = integer(config, "num_local_experts", "num_experts")
    return {**dims, "experts": found, "expert_ff": dims["ff"]}


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, OUTPUT, *NORMS, *ATTENTION, *_HEAD_NORMS, *_EXPERTS)


def _rope(config: Config) -> Rope:
    rope = read_rope(config, ("default",), partial=True)
    if config.get("rotary_dim") is None or rope.get("partial_rotary_factor") is not None:
        return rope
    share = integer(config, "rotary_dim") / attention_dims(config)["head_dim"]
    return {**rope, "partial_rotary_factor": share}


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **decoder_keys(config, dims),
        **rope_keys(_rope(config)),
        "rope.dimension_count": u32(partial_rotation(_rope(config), dims)),
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "expert_gating_func": u32(SIGMOID),
    }


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "MiniMaxM2ForCausalLM", "minimax_m2")
    return {
        **config,
        **header.named(
            num_local_experts="expert_count",
            num_experts_per_tok="expert_used_count",
        ),
        "rope_parameters": partial_config(config, header),
    }


MINIMAX_M2 = Architecture(
    name="minimax-m2",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    defaults={
        "tie_word_embeddings": False,
        "rope_theta": 5e6,
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "scoring_func": ("sigmoid",),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "tie_word_embeddings": (False,),
    },
    renames=((r"\.mlp\.", ".block_sparse_moe."),),
    ignored=(r".*\.rotary_emb\.inv_freq", r"model\.mtp_.*", r"mtp\..*"),
    folds=DECODER,
)
