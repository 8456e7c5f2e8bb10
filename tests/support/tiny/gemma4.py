"""Gemma 3n; Gemma 4 with keys that are values, with experts, with per-layer embeddings."""

from __future__ import annotations

from support.tiny.base import BASE, VISION, VOCAB, Tiny

GEMMA4 = {
    **{key: value for key, value in BASE.items() if key != "rope_parameters"},
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional", "rope_theta": 30000.0, "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
    },
}  # fmt: skip
SMALL = {
    **GEMMA4,
    "attention_k_eq_v": False,
    "num_global_key_value_heads": None,
    "num_key_value_heads": 1,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 10.0,
}

GEMMA3N = {
    **{key: value for key, value in BASE.items() if key != "rope_parameters"},
    "num_hidden_layers": 3,
    "intermediate_size": 2048,
    "head_dim": 16,
    "vocab_size_per_layer_input": VOCAB,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.95] * 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 30000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
    },
}

MODELS: dict[str, Tiny] = {
    "gemma3n": Tiny("Gemma3nForCausalLM", GEMMA3N, config_class="Gemma3nTextConfig", beyond=True),
    # With the embeddings as its head and no soft cap it would only ever repeat a token.
    "gemma4": Tiny(
        "Gemma4ForCausalLM",
        GEMMA4 | {"tie_word_embeddings": False},
        config_class="Gemma4TextConfig",
        beyond=True,
    ),
    "gemma4-moe": Tiny(
        "Gemma4ForCausalLM",
        GEMMA4
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        | {"moe_intermediate_size": 32, "final_logit_softcapping": 20.0},
        config_class="Gemma4TextConfig",
        beyond=True,
        routed=True,
    ),
    "gemma4-small": Tiny("Gemma4ForCausalLM", SMALL, config_class="Gemma4TextConfig", beyond=True),
    "gemma4-images": Tiny(
        "Gemma4ForConditionalGeneration",
        {
            "text_config": SMALL | {"model_type": "gemma4_text", "pad_token_id": 0},
            "vision_config": VISION | {"head_dim": 16, "position_embedding_size": 64},
            "audio_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "output_proj_dims": 32,
                "subsampling_conv_channels": [8, 4],
            },
            "image_token_id": VOCAB - 1,
            "audio_token_id": VOCAB - 2,
            "video_token_id": VOCAB - 3,
        },
        config_class="Gemma4Config",
        beyond=True,
    ),
    "gemma4-unified": Tiny(
        "Gemma4UnifiedForCausalLM",
        {key: value for key, value in GEMMA4.items() if "per_layer" not in key}
        | {"tie_word_embeddings": False},
        config_class="Gemma4UnifiedTextConfig",
        beyond=True,
    ),
}
