"""Latent attention, and mixtures of experts after DeepSeek's."""

from __future__ import annotations

from typing import Any

from support.tiny.base import BASE, HALF_ROPE, LONG_ROPE, YARN_ROPE, Tiny

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

MODELS = {
    "deepseek-v3": Tiny(
        "DeepseekV3ForCausalLM",
        MLA | ROUTED | {"n_group": 4, "topk_group": 2, "rope_parameters": MSCALE_ROPE},
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
        | {"mlp_layer_types": ["dense", "dense", "sparse"]},
        routed=True,
        absorbed=True,
    ),
    "glm4-moe": Tiny(
        "Glm4MoeForCausalLM",
        BASE
        | ROUTED
        | {"head_dim": 16, "attention_bias": True, "use_qk_norm": True}
        | {"n_group": 2, "topk_group": 1, "rope_parameters": HALF_ROPE},
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
        | {"moe_intermediate_size": 32, "router_scaling_factor": 1.7},
        routed=True,
    ),
    "exaone-moe": Tiny(
        "ExaoneMoeForCausalLM",
        BASE
        | ROUTED
        | {"num_hidden_layers": 4, "head_dim": 32, "num_experts": 8, "num_shared_experts": 2}
        | {"sliding_window": 24, "sliding_window_pattern": "LLG"}
        | {"n_group": 2, "topk_group": 1}
        | {
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ]
        },
        beyond=True,
        routed=True,
    ),
}
