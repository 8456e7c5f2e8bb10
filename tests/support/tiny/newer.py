"""Families of 2025 and after that are near the older ones."""

from __future__ import annotations

from support.tiny.base import (
    BASE,
    EXPERTS,
    HALF_ROPE,
    LAYER_NORM,
    LLAMA3_ROPE,
    MROPE,
    VISION,
    VOCAB,
    YARN_ROPE,
    Tiny,
)

_YARN = YARN_ROPE | {
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.2,
}
_LLAMA4 = (
    BASE
    | {"num_hidden_layers": 4, "num_experts_per_tok": 1, "num_local_experts": 4}
    | {"intermediate_size": 32, "intermediate_size_mlp": 96, "head_dim": 32}
)

_COHERE = (
    LAYER_NORM
    | EXPERTS
    | {"layer_norm_eps": 0.01, "logit_scale": 0.25, "tie_word_embeddings": True, "head_dim": 16}
    | {"sliding_window": 16, "num_experts": 4, "intermediate_size": 32}
)
_LAGUNA = (
    BASE
    | EXPERTS
    | {"num_hidden_layers": 3, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 48, "moe_routed_scaling_factor": 1.5}
    | {"sliding_window": 16}
    | {
        "rope_parameters": {
            "full_attention": YARN_ROPE | {"partial_rotary_factor": 0.5, "attention_factor": 0.8},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    }
)
_GLM4V = {
    "vision_config": VISION | {"depth": 1, "out_hidden_size": 64, "num_heads": 2},
    "image_token_id": VOCAB - 1,
    "video_token_id": VOCAB - 2,
    "image_start_token_id": VOCAB - 3,
    "image_end_token_id": VOCAB - 4,
    "video_start_token_id": VOCAB - 5,
    "video_end_token_id": VOCAB - 6,
}
_GRANITE_SWA = (
    BASE
    | {"num_hidden_layers": 3, "sliding_window": 16, "layer_rope_theta": [300.0, 0, 300.0]}
    | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4}
    | {"attention_multiplier": 0.125, "logits_scaling": 0.5}
)
_NEXTN: dict[str, tuple[int, ...]] = {
    "eh_proj": (64, 128),
    "enorm": (64,),
    "hnorm": (64,),
    "shared_head.norm": (64,),
}
_EXPERTS_BESIDE: dict[str, tuple[int, ...]] = {
    f"mlp.experts.{expert}.{name}": shape
    for expert in range(4)
    for name, shape in {
        "gate_proj": (32, 64),
        "up_proj": (32, 64),
        "down_proj": (64, 32),
    }.items()
}
_NTK_ROPE = {"rope_type": "dynamic", "rope_theta": 300.0, "alpha": 20.0, "factor": 1.0}

MODELS: dict[str, Tiny] = {
    "llama-yarn-scale": Tiny(
        "LlamaForCausalLM",
        BASE | {"head_dim": 32, "rope_parameters": YARN_ROPE | {"attention_factor": 0.7}},
        beyond=True,
    ),
    "llama-dynamic": Tiny(
        "LlamaForCausalLM",
        BASE
        | {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 3000.0, "factor": 4.0},
        },
    ),
    "ministral3": Tiny(
        "Ministral3ForCausalLM", BASE | {"head_dim": 32, "rope_parameters": _YARN}, beyond=True
    ),
    "ministral3-images": Tiny(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": BASE
            | {"model_type": "ministral3", "head_dim": 16, "rope_parameters": _YARN},
            "vision_config": VISION | {"model_type": "pixtral"},
            "image_token_index": VOCAB - 1,
            "tie_word_embeddings": False,
        },
        beyond=True,
    ),
    "llama4": Tiny(
        "Llama4ForCausalLM",
        _LLAMA4 | {"interleave_moe_layer_step": 2},
        config_class="Llama4TextConfig",
        loads_packed=False,
        routed=True,
    ),
    "llama4-images": Tiny(
        "Llama4ForConditionalGeneration",
        {
            "text_config": _LLAMA4
            | {
                "rope_parameters": LLAMA3_ROPE
                | {"low_freq_factor": 1.0, "high_freq_factor": 1.0, "factor": 16.0}
            },
            "vision_config": VISION
            | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
            "boi_token_index": VOCAB - 3,
            "eoi_token_index": VOCAB - 2,
            "image_token_index": VOCAB - 1,
        },
        config_class="Llama4Config",
        loads_packed=False,
        routed=True,
    ),
    "qwen3-vl-moe": Tiny(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": BASE
            | EXPERTS
            | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48}
            | {"rope_parameters": MROPE},
            "vision_config": VISION
            | {"depth": 1, "out_hidden_size": 64, "num_heads": 2}
            | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            "image_token_id": VOCAB - 1,
            "video_token_id": VOCAB - 2,
            "vision_start_token_id": VOCAB - 3,
        },
        routed=True,
        turned=True,
    ),
    "hunyuan-dense": Tiny(
        "HunYuanDenseV1ForCausalLM",
        BASE | {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": _NTK_ROPE},
        config_class="HunYuanDenseV1Config",
    ),
    "hunyuan-moe": Tiny(
        "HunYuanMoEV1ForCausalLM",
        BASE
        | {"num_experts": 4, "moe_topk": 2, "intermediate_size": 32, "head_dim": 16}
        | {"tie_word_embeddings": True, "rope_parameters": _NTK_ROPE},
        config_class="HunYuanMoEV1Config",
        routed=True,
    ),
    "cohere2-moe": Tiny(
        "Cohere2MoeForCausalLM",
        _COHERE
        | {"first_k_dense_replace": 1, "prefix_dense_intermediate_size": 80}
        | {"num_shared_experts": 2, "expert_selection_fn": "sigmoid", "norm_topk_prob": False}
        | {"num_nextn_predict_layers": 1},
        beside={
            f"model.layers.2.{name}.weight": shape
            for name, shape in {
                **_NEXTN,
                "input_layernorm": (64,),
                **_EXPERTS_BESIDE,
                "self_attn.q_proj": (64, 64),
                "self_attn.k_proj": (32, 64),
                "self_attn.v_proj": (32, 64),
                "self_attn.o_proj": (64, 64),
                "mlp.gate": (4, 64),
                "mlp.shared_experts.gate_proj": (64, 64),
                "mlp.shared_experts.up_proj": (64, 64),
                "mlp.shared_experts.down_proj": (64, 64),
            }.items()
        },
        beyond=True,
        routed=True,
    ),
    "cohere2-moe-rms": Tiny(
        "Cohere2MoeForCausalLM",
        _COHERE | {"rms_norm_eps": 0.01, "layer_types": ["full_attention", "sliding_attention"]},
        beyond=True,
        routed=True,
    ),
    "apertus": Tiny(
        "ApertusForCausalLM",
        BASE | {"head_dim": 32, "pad_token_id": 0, "rope_parameters": LLAMA3_ROPE},
        beyond=True,
    ),
    "mellum": Tiny(
        "MellumForCausalLM",
        BASE
        | EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 32, "sliding_window": 16}
        | {"layer_types": ["sliding_attention", "full_attention"]}
        | {
            "rope_parameters": {
                "full_attention": YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
        beyond=True,
        routed=True,
    ),
    "laguna": Tiny(
        "LagunaForCausalLM",
        _LAGUNA
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
        | {"num_attention_heads_per_layer": [4, 6, 6], "gating": True},
        beyond=True,
        routed=True,
    ),
    "laguna-elements": Tiny(
        "LagunaForCausalLM",
        _LAGUNA
        | {"gating": "per-element", "mlp_layer_types": ["dense", "dense", "sparse"]}
        | {"layer_types": ["full_attention"] * 3},
        beyond=True,
        routed=True,
    ),
    "afmoe": Tiny(
        "AfmoeForCausalLM",
        BASE
        | EXPERTS
        | {"num_hidden_layers": 5, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32}
        | {"num_dense_layers": 2, "num_shared_experts": 2, "route_scale": 1.5}
        | {"mup_enabled": True, "sliding_window": 16},
        beyond=True,
        routed=True,
    ),
    "mimo2": Tiny(
        "MiMoV2FlashForCausalLM",
        BASE
        | {"num_hidden_layers": 2, "head_dim": 48, "v_head_dim": 32, "moe_intermediate_size": 32}
        | {"num_key_value_heads": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"attention_value_scale": 0.6, "sliding_window": 16}
        | {"layer_types": ["full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.334}
                for kind, theta in {"full_attention": 3000.0, "sliding_attention": 300.0}.items()
            },
        },
        config_class="MiMoV2FlashConfig",
        beyond=True,
        routed=True,
    ),
    "jais2": Tiny("Jais2ForCausalLM", LAYER_NORM | {"head_dim": 32, "layer_norm_eps": 0.01}),
    "glm4v": Tiny(
        "Glm4vForConditionalGeneration",
        _GLM4V
        | {
            "text_config": BASE
            | {"rope_parameters": HALF_ROPE | {"mrope_section": [2, 1, 1]}, "pad_token_id": 0},
        },
    ),
    "glm4v-moe": Tiny(
        "Glm4vMoeForConditionalGeneration",
        _GLM4V
        | {
            "text_config": BASE
            | {"rope_parameters": HALF_ROPE | {"mrope_section": [2, 1, 1]}, "pad_token_id": 0}
            | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True},
        },
        routed=True,
    ),
    "paddleocr": Tiny(
        "PaddleOCRVLForConditionalGeneration",
        {
            "text_config": BASE
            | {"head_dim": 16, "pad_token_id": 0, "rope_parameters": MROPE}
            | {"tie_word_embeddings": True},
            "vision_config": VISION | {"spatial_merge_size": 1},
            "image_token_id": VOCAB - 1,
            "video_token_id": VOCAB - 2,
            "vision_start_token_id": VOCAB - 3,
            "vision_end_token_id": VOCAB - 4,
        },
    ),
    "solar-open": Tiny(
        "SolarOpenForCausalLM",
        {key: value for key, value in BASE.items() if key != "intermediate_size"}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"head_dim": 32, "routed_scaling_factor": 1.5, "rope_parameters": YARN_ROPE},
        beyond=True,
        routed=True,
    ),
    "muse-glimmer": Tiny(
        "MuseGlimmerForConditionalGeneration",
        {
            "text_config": BASE
            | {"num_hidden_layers": 3, "head_dim": 32, "sliding_window": 16, "pad_token_id": 0}
            | {"qk_scale_factor": 1.3, "output_multiplier": 0.7, "final_logit_softcapping": 9.0}
            | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
            | {"layer_rope_theta": [3000.0, 0, 3000.0]},
            "vision_config": VISION,
            "image_token_id": VOCAB - 1,
            "video_token_id": VOCAB - 2,
            "out_hidden_size": 64,
            "projector_hidden_size": 64,
        },
        beyond=True,
    ),
    "step35": Tiny(
        "Step3p7ForConditionalGeneration",
        {
            "text_config": BASE
            | {"num_hidden_layers": 3, "head_dim": 32, "sliding_window": 16, "pad_token_id": 0}
            | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            | {"share_expert_dim": 48, "moe_router_scaling_factor": 1.5}
            | {"num_nextn_predict_layers": 1, "mtp_layer_types": ["sliding_attention"]}
            | {"mtp_mlp_layer_types": ["dense"]}
            | {"num_sliding_attention_heads": 6, "swiglu_limits": [0.0, 0.0, 0.7]}
            | {"swiglu_limits_shared": [0.0, 1.1, 0.9]}
            | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
            | {"mlp_layer_types": ["dense", "dense", "sparse"]}
            | {
                "rope_parameters": {
                    "full_attention": LLAMA3_ROPE | {"partial_rotary_factor": 0.5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                },
            },
            "vision_config": VISION,
            "image_token_id": VOCAB - 1,
        },
        beside={
            f"model.layers.3.{name}.weight": shape
            for name, shape in {
                **{key: value for key, value in _NEXTN.items() if key != "shared_head.norm"},
                "transformer.shared_head.norm": (64,),
                "input_layernorm": (64,),
                "post_attention_layernorm": (64,),
                "self_attn.q_norm": (32,),
                "self_attn.k_norm": (32,),
                "self_attn.g_proj": (6, 64),
                "self_attn.q_proj": (192, 64),
                "self_attn.k_proj": (64, 64),
                "self_attn.v_proj": (64, 64),
                "self_attn.o_proj": (64, 192),
                "mlp.gate_proj": (96, 64),
                "mlp.up_proj": (96, 64),
                "mlp.down_proj": (64, 96),
            }.items()
        },
        beyond=True,
        routed=True,
        loads_packed=False,
    ),
    "granite-swa": Tiny("GraniteSWAForCausalLM", _GRANITE_SWA, beyond=True),
    "granite-swa-moe": Tiny(
        "GraniteMoeSWAForCausalLM",
        _GRANITE_SWA
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
        | {"shared_intermediate_size": 48},
        config_class="GraniteMoeSWAConfig",
        beyond=True,
        routed=True,
    ),
    "glm-ocr": Tiny(
        "GlmOcrForConditionalGeneration",
        _GLM4V
        | {
            "text_config": BASE
            | {"rope_parameters": HALF_ROPE | {"mrope_section": [2, 1, 1]}, "pad_token_id": 0}
            | {"head_dim": 16, "num_nextn_predict_layers": 1},
        },
        beside={
            f"model.language_model.layers.2.{name}.weight": shape
            for name, shape in {
                "eh_proj": (64, 128),
                "enorm": (64,),
                "hnorm": (64,),
                "shared_head.norm": (64,),
                "input_layernorm": (64,),
                "post_attention_layernorm": (64,),
                "post_self_attn_layernorm": (64,),
                "post_mlp_layernorm": (64,),
                "self_attn.q_proj": (64, 64),
                "self_attn.k_proj": (32, 64),
                "self_attn.v_proj": (32, 64),
                "self_attn.o_proj": (64, 64),
                "mlp.gate_up_proj": (192, 64),
                "mlp.down_proj": (64, 96),
            }.items()
        },
    ),
}
