"""State-space layers, short convolutions, and the hybrids of these with attention."""

from __future__ import annotations

from typing import Any

from support.tiny.base import BASE, EXPERTS, VISION, VOCAB, Tiny

_LFM2 = {key: value for key, value in BASE.items() if key != "rms_norm_eps"} | {
    "num_hidden_layers": 4,
    "norm_eps": 0.01,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "tie_word_embeddings": True,
}
_LFM2_MOE = (
    _LFM2
    | EXPERTS
    | {"num_hidden_layers": 4, "num_dense_layers": 1, "num_experts": 4}
    | {"moe_intermediate_size": 32, "conv_L_cache": 4}
)
_GRANITE = BASE | {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.125,
    "logits_scaling": 0.5,
}
_GRANITE_HYBRID = _GRANITE | {
    "num_hidden_layers": 4,
    "shared_intermediate_size": 64,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
    "mamba_d_head": 16,
    "mamba_chunk_size": 32,
}
_NEMOTRON_H: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "layer_norm_epsilon": 0.01,
    "ssm_state_size": 24,
    "mamba_num_heads": 12,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 32,
    "time_step_min": 1e-12,
}
_NEMOTRON_3 = _NEMOTRON_H | {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
}
_NEMOTRON_BLOCK = {
    "mtp.layers.0.enorm.weight": (64,),
    "mtp.layers.0.hnorm.weight": (64,),
    "mtp.layers.0.eh_proj.weight": (64, 128),
    "mtp.layers.0.norm.weight": (64,),
    "mtp.layers.0.mixer.q_proj.weight": (128, 64),
    "mtp.layers.0.mixer.k_proj.weight": (64, 64),
    "mtp.layers.0.mixer.v_proj.weight": (64, 64),
    "mtp.layers.0.mixer.o_proj.weight": (64, 128),
    "mtp.layers.1.norm.weight": (64,),
    "mtp.layers.1.mixer.gate.weight": (4, 64),
    "mtp.layers.1.mixer.gate.e_score_correction_bias": (4,),
    **{f"mtp.layers.1.mixer.experts.{e}.up_proj.weight": (32, 64) for e in range(4)},
    **{f"mtp.layers.1.mixer.experts.{e}.down_proj.weight": (64, 32) for e in range(4)},
    "mtp.layers.1.mixer.shared_experts.up_proj.weight": (48, 64),
    "mtp.layers.1.mixer.shared_experts.down_proj.weight": (64, 48),
    "mtp.layers.1.final_layernorm.weight": (64,),
}
_FALCON_H1 = BASE | {
    "head_dim": 32,
    "mamba_d_ssm": 96,
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
    "mamba_d_head": 16,
    "mamba_chunk_size": 32,
}
_MAMBA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 1,  # transformers takes one token after the other
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "layer_norm_epsilon": 0.01,
    "conv_kernel": 3,
    "state_size": 24,
    "tie_word_embeddings": False,
}

MODELS: dict[str, Tiny] = {
    "lfm2-moe": Tiny("Lfm2MoeForCausalLM", _LFM2_MOE, routed=True),
    "lfm2-vl": Tiny(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": _LFM2
            | {"model_type": "lfm2", "block_multiple_of": 32, "conv_L_cache": 5},
            "vision_config": VISION | {"model_type": "siglip2_vision_model", "num_patches": 4},
            "image_token_id": VOCAB - 1,
            "downsample_factor": 1,
            "tie_word_embeddings": True,
        },
    ),
    "granite-moe": Tiny(
        "GraniteMoeForCausalLM", _GRANITE | EXPERTS | {"num_local_experts": 4}, routed=True
    ),
    "granite-moe-stacked": Tiny(
        "GraniteMoeForCausalLM",
        _GRANITE | EXPERTS | {"num_local_experts": 4},
        save={"save_original_format": False},
        routed=True,
    ),
    "granite-moe-shared": Tiny(
        "GraniteMoeSharedForCausalLM",
        _GRANITE | EXPERTS | {"num_local_experts": 4, "shared_intermediate_size": 64},
        routed=True,
    ),
    "granite-hybrid": Tiny(
        "GraniteMoeHybridForCausalLM",
        _GRANITE_HYBRID | EXPERTS | {"num_hidden_layers": 4, "num_local_experts": 4},
        routed=True,
    ),
    "granite-hybrid-dense": Tiny(
        "GraniteMoeHybridForCausalLM",
        _GRANITE_HYBRID | {"num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    "granite-attention": Tiny(
        "GraniteMoeHybridForCausalLM",
        _GRANITE_HYBRID
        | {"num_local_experts": 0, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    ),
    "granite-attention-moe": Tiny(
        "GraniteMoeHybridForCausalLM",
        _GRANITE_HYBRID
        | EXPERTS
        | {
            "num_local_experts": 4,
            "position_embedding_type": "rope",
            "layer_types": ["full_attention"] * 2,
        },
        routed=True,
    ),
    "nemotron-h": Tiny(
        "NemotronHForCausalLM",
        _NEMOTRON_H
        | {
            "layers_block_type": [
                "linear_attention",
                "mlp",
                "full_attention",
                "mlp",
                "linear_attention",
                "mlp",
            ]
        },
    ),
    "nemotron-h-moe": Tiny("NemotronHForCausalLM", _NEMOTRON_3, routed=True),
    "nemotron-h-mtp": Tiny(
        "NemotronHForCausalLM",
        _NEMOTRON_3 | {"num_hidden_layers": 4, "num_nextn_predict_layers": 1},
        beside=_NEMOTRON_BLOCK,
        routed=True,
    ),
    "nemotron-h-latent": Tiny(
        "NemotronHForCausalLM", _NEMOTRON_3 | {"moe_latent_size": 32}, routed=True
    ),
    "falcon-h1": Tiny(
        "FalconH1ForCausalLM",
        _FALCON_H1
        | {"embedding_multiplier": 3.5, "lm_head_multiplier": 0.7, "key_multiplier": 1.3}
        | {"attention_in_multiplier": 0.9, "attention_out_multiplier": 0.6}
        | {"ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8, "mlp_multipliers": [0.9, 0.5]}
        | {"ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 0.7]},
        folded=True,
    ),
    "falcon-h1-norm": Tiny(
        "FalconH1ForCausalLM",
        _FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "mamba": Tiny("MambaForCausalLM", _MAMBA | {"time_step_rank": 8}, loads_packed=False, chunks=3),
    "falcon-mamba": Tiny(
        "FalconMambaForCausalLM", _MAMBA | {"mixer_rms_eps": 0.01}, loads_packed=False, chunks=3
    ),
    "mamba2": Tiny(
        "Mamba2ForCausalLM",
        _MAMBA
        | {"num_hidden_layers": 3, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 32},
        loads_packed=False,
    ),
    "jamba": Tiny(
        "JambaForCausalLM",
        {key: value for key, value in BASE.items() if key != "rope_parameters"}
        | EXPERTS
        | {"num_experts": 4, "mamba_d_state": 24, "mamba_dt_rank": 8, "mamba_d_conv": 3}
        | {"attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1},
        routed=True,
        chunks=3,
    ),
    "bamba": Tiny(
        "BambaForCausalLM",
        BASE
        | {"num_hidden_layers": 3, "attn_layer_indices": [1]}
        | {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 24, "mamba_chunk_size": 32},
    ),
}
