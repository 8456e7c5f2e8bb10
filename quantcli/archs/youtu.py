"""Youtu-LLM: latent attention with a dense MLP; llama.cpp's "deepseek2" without experts.

Sources: Tencent's model card, transformers' modeling_youtu.py, llama.cpp's
src/models/deepseek2.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from quantcli.archs.config import Config
from quantcli.archs.decoder import EMBEDDING, MLP, NORMS, OUTPUT_NORM, output
from quantcli.archs.deepseek2 import DEEPSEEK_V3
from quantcli.archs.mla import mla_dims, mla_keys, mla_rules
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue, u32


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *mla_rules(config), *MLP)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **mla_keys(config, dims),
        "leading_dense_block_count": u32(dims["layers"]),
        # llama.cpp asks for these even where no layer has experts.
        "expert_feed_forward_length": u32(dims["ff"]),
        "expert_shared_count": u32(0),
    }


YOUTU = replace(
    DEEPSEEK_V3,
    read_dims=mla_dims,
    read_rules=_rules,
    to_keys=_keys,
    mtp=None,
    defaults={
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_interleave": (True,),
    },
)
