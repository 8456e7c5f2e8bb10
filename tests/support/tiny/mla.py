"""Latent attention, and mixtures of experts after DeepSeek's."""

from __future__ import annotations

from typing import Any

from support.tiny.base import BASE, HALF_ROPE, LONG_ROPE, VISION, VOCAB, YARN_ROPE, Tiny

MLA: dict[str, Any] = BASE | {
    "rms_norm_eps": 1e-6,  # which transformers takes for the norms of latents in any case
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}
MSCALE_ROPE = YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 0.7}


def _block(prefix: str, *shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A block for multi-token prediction: two norms more and whatever else it has."""
    norms = {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
    return {prefix + name: shape for part in (norms, *shapes) for name, shape in part.items()}


def _mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, 64),
        f"{prefix}up_proj.weight": (width, 64),
        f"{prefix}down_proj.weight": (64, width),
    }


def _mixture(gate: str, bias: str, shared: str) -> dict[str, tuple[int, ...]]:
    experts = [_mlp(f"mlp.experts.{e}.", 32) for e in range(8)]
    return {
        f"mlp.{gate}.weight": (8, 64),
        f"mlp.{bias}": (8,),
        **{name: shape for expert in experts for name, shape in expert.items()},
        **_mlp(f"mlp.{shared}.", 64),
    }


_NEXTN = {"eh_proj.weight": (64, 128), "enorm.weight": (64,), "hnorm.weight": (64,)}
_SHARED_HEAD = {
    "embed_tokens.weight": (VOCAB, 64),
    "shared_head.head.weight": (VOCAB, 64),
    "shared_head.norm.weight": (64,),
}
_LATENT = {
    "self_attn.q_a_proj.weight": (64, 64),
    "self_attn.q_a_layernorm.weight": (64,),
    "self_attn.q_b_proj.weight": (192, 64),
    "self_attn.kv_a_proj_with_mqa.weight": (48, 64),
    "self_attn.kv_a_layernorm.weight": (32,),
    "self_attn.kv_b_proj.weight": (224, 32),
    "self_attn.o_proj.weight": (64, 96),
}


def _grouped(head: int, *, biases: bool = False) -> dict[str, tuple[int, ...]]:
    wide, narrow = 4 * head, 2 * head
    return {
        "self_attn.q_proj.weight": (wide, 64),
        "self_attn.k_proj.weight": (narrow, 64),
        "self_attn.v_proj.weight": (narrow, 64),
        "self_attn.o_proj.weight": (64, wide),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        **(
            {f"self_attn.{x}_proj.bias": (wide if x == "q" else narrow,) for x in "qkv"}
            if biases
            else {}
        ),
    }


_ROUTED = _mixture("gate", "gate.e_score_correction_bias", "shared_experts")
_INDEXER = {"index_n_heads": 16, "index_head_dim": 64, "index_topk": 128}
_INDEXERS = {
    "self_attn.indexer.wq_b.weight": (1024, 64),
    "self_attn.indexer.wk.weight": (64, 64),
    "self_attn.indexer.k_norm.weight": (64,),
    "self_attn.indexer.k_norm.bias": (64,),
    "self_attn.indexer.weights_proj.weight": (16, 64),
}
_ONE_BLOCK = {"num_nextn_predict_layers": 1}

MODELS = {
    "deepseek-v3": Tiny(
        "DeepseekV3ForCausalLM",
        MLA | ROUTED | _ONE_BLOCK | {"n_group": 4, "topk_group": 2, "rope_parameters": MSCALE_ROPE},
        beside=_block("model.layers.3.", _LATENT, _ROUTED, _NEXTN, _SHARED_HEAD),
        beyond=True,
        routed=True,
        absorbed=True,
    ),
    "deepseek-v2": Tiny(
        "DeepseekV2ForCausalLM",
        MLA
        | ROUTED
        | {"q_lora_rank": None, "norm_topk_prob": False, "topk_method": "greedy"}
        | {"rope_parameters": MSCALE_ROPE},
        beyond=True,
        routed=True,
        absorbed=True,
    ),
    "glm4-moe-lite": Tiny(
        "Glm4MoeLiteForCausalLM",
        {key: value for key, value in (MLA | ROUTED).items() if key != "first_k_dense_replace"}
        | _ONE_BLOCK
        | {"mlp_layer_types": ["dense", "dense", "sparse"]},
        beside=_block("model.layers.3.", _LATENT, _ROUTED, _NEXTN),
        routed=True,
        absorbed=True,
    ),
    "glm4-moe": Tiny(
        "Glm4MoeForCausalLM",
        BASE
        | ROUTED
        | _ONE_BLOCK
        | {"head_dim": 16, "attention_bias": True, "use_qk_norm": True}
        | {"n_group": 2, "topk_group": 1, "rope_parameters": HALF_ROPE},
        beside=_block("model.layers.2.", _grouped(16, biases=True), _ROUTED, _NEXTN, _SHARED_HEAD),
        routed=True,
    ),
    "dots1": Tiny(
        "Dots1ForCausalLM",
        BASE | ROUTED | {"head_dim": 16, "num_key_value_heads": 4, "sliding_window": None},
        routed=True,
    ),
    "minimax-m2": Tiny(
        "MiniMaxM2ForCausalLM",
        BASE
        | {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3}
        | {"rope_parameters": HALF_ROPE},
        routed=True,
    ),
    "mistral4": Tiny(
        "Mistral4ForCausalLM",
        MLA
        | ROUTED
        | {
            "rope_parameters": YARN_ROPE
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
        },
        beyond=True,
        routed=True,
        absorbed=True,
    ),
    "minicpm3": Tiny("MiniCPM3ForCausalLM", MLA),
    "minicpm3-long": Tiny(
        "MiniCPM3ForCausalLM",
        MLA
        | {
            "rope_parameters": LONG_ROPE
            | {"partial_rotary_factor": 1.0}
            | {key: LONG_ROPE[key][:8] for key in ("short_factor", "long_factor")}
        },
        beyond=True,
    ),
    "ernie4_5-moe": Tiny(
        "Ernie4_5_MoeForCausalLM",
        BASE
        | {"num_hidden_layers": 3, "pad_token_id": 0, "tie_word_embeddings": True}
        | {"moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2}
        | {"moe_intermediate_size": 32, "moe_layer_start_index": 1},
        routed=True,
    ),
    "hy_v3": Tiny(
        "HYV3ForCausalLM",
        BASE
        | {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 2}
        | {"moe_intermediate_size": 32, "router_scaling_factor": 1.7}
        | _ONE_BLOCK,
        beside=_block(
            "model.layers.2.",
            _grouped(32),
            _mixture("router.gate", "expert_bias", "shared_mlp"),
            _NEXTN,
            {"final_layernorm.weight": (64,)},
        ),
        routed=True,
    ),
    "exaone-moe": Tiny(
        "ExaoneMoeForCausalLM",
        BASE
        | ROUTED
        | {"num_hidden_layers": 4, "head_dim": 32, "num_experts": 8, "num_shared_experts": 2}
        | {"sliding_window": 24, "sliding_window_pattern": 2}
        | {"n_group": 2, "topk_group": 1}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2}
        | _ONE_BLOCK,
        beside=_block("mtp.layers.0.", _grouped(32), _mlp("mlp.", 96))
        | {"mtp.fc.weight": (64, 128), "mtp.norm.weight": (64,)}
        | {f"mtp.pre_fc_norm_{x}.weight": (64,) for x in ("embedding", "hidden")},
        beyond=True,
        routed=True,
    ),
    "deepseek-v32": Tiny(
        "DeepseekV32ForCausalLM",
        MLA
        | ROUTED
        | _ONE_BLOCK
        | _INDEXER
        | {"n_group": 4, "topk_group": 2}
        | {"rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        beside=_block("model.layers.3.", _LATENT, _INDEXERS, _ROUTED, _NEXTN, _SHARED_HEAD),
        beyond=True,
        routed=True,
        absorbed=True,
    ),
    "glm-moe-dsa": Tiny(
        "GlmMoeDsaForCausalLM",
        MLA
        | ROUTED
        | _ONE_BLOCK
        | _INDEXER
        | {"indexer_types": ["full", "shared", "full"], "index_topk": 512},
        beside=_block("model.layers.3.", _LATENT, _ROUTED, _NEXTN),
        routed=True,
        absorbed=True,
    ),
    "kimi-k25": Tiny(
        "Kimi_K25ForConditionalGeneration",
        {
            "text_config": MLA | ROUTED | {"model_type": "deepseek_v3"},
            "vision_config": VISION
            | {"pos_emb_height": 4, "pos_emb_width": 4, "hidden_size": 64}
            | {"intermediate_size": 64},
            "projection_hidden_size": 64,
            "tie_word_embeddings": False,
            "image_token_id": VOCAB - 1,
            "video_token_id": VOCAB - 2,
            "vision_start_token_id": VOCAB - 3,
            "vision_end_token_id": VOCAB - 4,
        },
        # Its published layout, as transformers saves it, calls the text's layers blocks.
        save={"save_original_format": False},
        routed=True,
        absorbed=True,
    ),
    "youtu": Tiny(
        "YoutuForCausalLM",
        MLA | {"tie_word_embeddings": True, "rope_parameters": MSCALE_ROPE},
        beyond=True,
        absorbed=True,
    ),
}
