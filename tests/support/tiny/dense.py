"""Llama and the decoders that are near it, dense and with experts."""

from __future__ import annotations

from support.tiny.base import (
    BASE,
    EXPERTS,
    GEMMA,
    GEMMA3,
    HALF_ROPE,
    LAYER_NORM,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    LONG_ROPE,
    MROPE,
    VISION,
    VOCAB,
    YARN_ROPE,
    Tiny,
)

MODELS: dict[str, Tiny] = {
    "llama": Tiny(
        "LlamaForCausalLM",
        BASE
        | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
        | {"max_position_embeddings": 2048},
    ),
    "llama-tied": Tiny("LlamaForCausalLM", BASE | {"tie_word_embeddings": True}),
    "llama-biases": Tiny(
        "LlamaForCausalLM",
        BASE | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama-llama3": Tiny(
        "LlamaForCausalLM", BASE | {"head_dim": 32, "rope_parameters": LLAMA3_ROPE}, beyond=True
    ),
    "llama-yarn": Tiny(
        "LlamaForCausalLM", BASE | {"head_dim": 32, "rope_parameters": YARN_ROPE}, beyond=True
    ),
    "llama-linear": Tiny("LlamaForCausalLM", BASE | {"rope_parameters": LINEAR_ROPE}, beyond=True),
    "mistral": Tiny(
        "MistralForCausalLM",
        BASE | {"num_attention_heads": 8, "head_dim": 32, "sliding_window": None},
    ),
    "mixtral": Tiny("MixtralForCausalLM", BASE | EXPERTS | {"num_local_experts": 4}, routed=True),
    "mixtral-stacked": Tiny(
        "MixtralForCausalLM",
        BASE | EXPERTS | {"num_local_experts": 4},
        save={"save_original_format": False},
        routed=True,
    ),
    "qwen2": Tiny("Qwen2ForCausalLM", dict(BASE)),
    "qwen2-yarn": Tiny(
        "Qwen2ForCausalLM",
        BASE | {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": YARN_ROPE},
        beyond=True,
    ),
    "qwen3": Tiny("Qwen3ForCausalLM", BASE | {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": Tiny(
        "Qwen3MoeForCausalLM",
        BASE
        | EXPERTS
        | {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
        routed=True,
    ),
    "qwen3-moe-stacked": Tiny(
        "Qwen3MoeForCausalLM",
        BASE
        | EXPERTS
        | {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
        save={"save_original_format": False},
        routed=True,
    ),
    "gemma2": Tiny(
        "Gemma2ForCausalLM",
        GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
        beyond=True,
    ),
    "gemma3": Tiny("Gemma3ForCausalLM", GEMMA3, config_class="Gemma3TextConfig", beyond=True),
    "gemma3-linear": Tiny(
        "Gemma3ForCausalLM",
        GEMMA3
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 30000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
        config_class="Gemma3TextConfig",
        beyond=True,
    ),
    "gemma3-full": Tiny(
        "Gemma3ForCausalLM",
        GEMMA3 | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        config_class="Gemma3TextConfig",
    ),
    "gemma3-images": Tiny(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": GEMMA3 | {"model_type": "gemma3_text"},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "boi_token_index": VOCAB - 3,
            "eoi_token_index": VOCAB - 2,
            "image_token_index": VOCAB - 1,
        },
        save={"save_original_format": False},
    ),
    "phi3": Tiny("Phi3ForCausalLM", BASE | {"pad_token_id": 0}),
    "phi3-longrope": Tiny(
        "Phi3ForCausalLM",
        BASE
        | {"pad_token_id": 0, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"original_max_position_embeddings": 256, "rope_parameters": LONG_ROPE}
        | {"max_position_embeddings": 1024},
        beyond=True,
    ),
    "granite": Tiny(
        "GraniteForCausalLM",
        BASE
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4}
        | {"attention_multiplier": 0.125, "logits_scaling": 0.5},
    ),
    "smollm3": Tiny(
        "SmolLM3ForCausalLM",
        BASE | {"num_hidden_layers": 4, "tie_word_embeddings": True, "pad_token_id": 0},
    ),
    "seed-oss": Tiny("SeedOssForCausalLM", BASE | {"head_dim": 32, "attention_out_bias": False}),
    "arcee": Tiny("ArceeForCausalLM", dict(BASE)),
    "olmo2": Tiny("Olmo2ForCausalLM", BASE | {"pad_token_id": 0}),
    "olmo3": Tiny(
        "Olmo3ForCausalLM",
        BASE | {"pad_token_id": 0, "num_hidden_layers": 4, "sliding_window": 16},
    ),
    "olmo3-yarn": Tiny(
        "Olmo3ForCausalLM",
        BASE
        | {"pad_token_id": 0, "num_hidden_layers": 4, "sliding_window": 16}
        | {
            "rope_parameters": {
                "full_attention": YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
    ),
    "gemma": Tiny("GemmaForCausalLM", BASE | {"head_dim": 32, "tie_word_embeddings": True}),
    "cohere": Tiny(
        "CohereForCausalLM",
        LAYER_NORM | {"layer_norm_eps": 0.01, "logit_scale": 0.25, "tie_word_embeddings": True},
    ),
    "cohere2": Tiny(
        "Cohere2ForCausalLM",
        LAYER_NORM
        | {"layer_norm_eps": 0.01, "logit_scale": 0.25, "tie_word_embeddings": True}
        | {"num_hidden_layers": 4, "sliding_window": 16},
    ),
    "nemotron": Tiny(
        "NemotronForCausalLM",
        LAYER_NORM | {"norm_eps": 0.01, "rope_parameters": HALF_ROPE},
    ),
    "nemotron-biases": Tiny(
        "NemotronForCausalLM",
        LAYER_NORM
        | {"norm_eps": 0.01, "rope_parameters": HALF_ROPE}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "starcoder2": Tiny(
        "Starcoder2ForCausalLM",
        LAYER_NORM | {"norm_epsilon": 0.01, "sliding_window": None, "tie_word_embeddings": True},
    ),
    "stablelm": Tiny(
        "StableLmForCausalLM",
        LAYER_NORM | {"layer_norm_eps": 0.01, "use_qkv_bias": True, "rope_parameters": HALF_ROPE},
    ),
    "phi2": Tiny(
        "PhiForCausalLM",
        LAYER_NORM | {"layer_norm_eps": 0.01, "rope_parameters": HALF_ROPE},
        config_class="PhiConfig",
    ),
    "glm4": Tiny(
        "Glm4ForCausalLM",
        BASE | {"head_dim": 16, "attention_bias": True, "rope_parameters": HALF_ROPE},
    ),
    "glm": Tiny(
        "GlmForCausalLM",
        BASE
        | {"head_dim": 16, "attention_bias": True, "pad_token_id": 0}
        | {"rope_parameters": HALF_ROPE},
    ),
    "ernie4_5": Tiny(
        "Ernie4_5ForCausalLM",
        BASE | {"head_dim": 32, "pad_token_id": 0, "tie_word_embeddings": True},
    ),
    "exaone4": Tiny(
        "Exaone4ForCausalLM",
        BASE
        | {"sliding_window": None, "layer_types": ["full_attention"] * 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
    ),
    "olmoe": Tiny(
        "OlmoeForCausalLM",
        BASE | EXPERTS | {"num_experts": 4, "num_key_value_heads": 4, "norm_topk_prob": False},
        routed=True,
    ),
    "qwen2-moe": Tiny(
        "Qwen2MoeForCausalLM",
        BASE
        | EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
        routed=True,
    ),
    "qwen2-vl": Tiny(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": BASE | {"rms_norm_eps": 1e-6, "rope_parameters": MROPE},
            "vision_config": VISION | {"depth": 1, "out_hidden_size": 64, "num_heads": 2},
            "image_token_id": VOCAB - 1,
            "video_token_id": VOCAB - 2,
            "vision_start_token_id": VOCAB - 3,
        },
    ),
    "qwen3-vl": Tiny(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": BASE | {"head_dim": 16, "rope_parameters": MROPE},
            "vision_config": VISION
            | {"depth": 1, "out_hidden_size": 64, "num_heads": 2}
            | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            "image_token_id": VOCAB - 1,
            "video_token_id": VOCAB - 2,
            "vision_start_token_id": VOCAB - 3,
        },
    ),
    "llava-qwen2": Tiny(
        "LlavaForConditionalGeneration",
        {
            "text_config": BASE | {"model_type": "qwen2"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": VOCAB - 1,
        },
    ),
    "mistral3": Tiny(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": BASE | {"model_type": "mistral", "sliding_window": None},
            "vision_config": VISION | {"model_type": "pixtral"},
            "image_token_index": VOCAB - 1,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2": Tiny(
        "Lfm2ForCausalLM",
        {key: value for key, value in BASE.items() if key != "rms_norm_eps"}
        | {"num_hidden_layers": 4, "norm_eps": 0.01, "block_multiple_of": 32}
        | {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
        | {"tie_word_embeddings": True},
    ),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
        | {"bos_token_id": 0, "eos_token_id": 1, "layer_norm_epsilon": 0.01},
        transposed=True,
    ),
}
