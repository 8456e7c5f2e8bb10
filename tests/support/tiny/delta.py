"""Gated delta nets with attention in some layers, and a block for multi-token prediction."""

from __future__ import annotations

from typing import Any

from support.tiny.base import BASE, VISION, YARN_ROPE, Tiny

_DELTA: dict[str, Any] = {
    **BASE,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 0.5},
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}
_ODD_LAYERS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
_MTP = {"mtp_num_hidden_layers": 1}


def _block(mlp: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The block behind the layers, which transformers neither makes nor loads."""
    layer = {
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (256, 64),
        "self_attn.k_proj.weight": (64, 64),
        "self_attn.v_proj.weight": (64, 64),
        "self_attn.o_proj.weight": (64, 128),
        "self_attn.q_norm.weight": (32,),
        "self_attn.k_norm.weight": (32,),
        **{f"mlp.{name}": shape for name, shape in mlp.items()},
    }
    return {
        "mtp.fc.weight": (64, 128),
        "mtp.norm.weight": (64,),
        "mtp.pre_fc_norm_embedding.weight": (64,),
        "mtp.pre_fc_norm_hidden.weight": (64,),
        **{f"mtp.layers.0.{name}": shape for name, shape in layer.items()},
    }


_DENSE_BLOCK = _block(
    {
        "gate_proj.weight": (96, 64),
        "up_proj.weight": (96, 64),
        "down_proj.weight": (64, 96),
    }
)
_EXPERTS_BLOCK = _block(
    {
        "gate.weight": (4, 64),
        **{f"experts.{e}.gate_proj.weight": (64, 64) for e in range(4)},
        **{f"experts.{e}.up_proj.weight": (64, 64) for e in range(4)},
        **{f"experts.{e}.down_proj.weight": (64, 64) for e in range(4)},
        "shared_expert_gate.weight": (1, 64),
        "shared_expert.gate_proj.weight": (96, 64),
        "shared_expert.up_proj.weight": (96, 64),
        "shared_expert.down_proj.weight": (64, 96),
    }
)
_STACKED_BLOCK = {
    name: shape for name, shape in _EXPERTS_BLOCK.items() if ".experts." not in name
} | {
    "mtp.layers.0.mlp.experts.gate_up_proj": (4, 128, 64),
    "mtp.layers.0.mlp.experts.down_proj": (4, 64, 64),
}
_SECTIONS = {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
_VISION = {
    **VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16,
}  # fmt: skip

MODELS: dict[str, Tiny] = {
    "qwen3-next": Tiny("Qwen3NextForCausalLM", _DELTA | _EXPERTS, routed=True),
    "qwen3-next-mtp": Tiny(
        "Qwen3NextForCausalLM",
        _DELTA | _EXPERTS | _MTP | {"layer_types": _ODD_LAYERS},
        beside=_EXPERTS_BLOCK,
        routed=True,
    ),
    "qwen35": Tiny("Qwen3_5ForCausalLM", dict(_DELTA), config_class="Qwen3_5TextConfig"),
    "qwen35-mtp": Tiny(
        "Qwen3_5ForCausalLM",
        _DELTA | _MTP | {"tie_word_embeddings": True, "layer_types": _ODD_LAYERS},
        config_class="Qwen3_5TextConfig",
        beside=_DENSE_BLOCK,
    ),
    "qwen35-yarn": Tiny(
        "Qwen3_5ForCausalLM",
        _DELTA | {"rope_parameters": {**YARN_ROPE, "partial_rotary_factor": 0.5}},
        config_class="Qwen3_5TextConfig",
        beyond=True,
    ),
    "qwen35-vl": Tiny(
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": _DELTA
            | _MTP
            | {"rope_parameters": {**_DELTA["rope_parameters"], **_SECTIONS}},
            "vision_config": _VISION,
            "tie_word_embeddings": False,
        },
        beside=_DENSE_BLOCK,
    ),
    "qwen35-moe": Tiny(
        "Qwen3_5MoeForCausalLM",
        {key: value for key, value in _DELTA.items() if key != "intermediate_size"} | _EXPERTS,
        config_class="Qwen3_5MoeTextConfig",
        routed=True,
    ),
    "qwen35-moe-mtp": Tiny(
        "Qwen3_5MoeForCausalLM",
        {key: value for key, value in _DELTA.items() if key != "intermediate_size"}
        | _EXPERTS
        | _MTP,
        config_class="Qwen3_5MoeTextConfig",
        save={"save_original_format": False},
        beside=_EXPERTS_BLOCK,
        routed=True,
    ),
    "qwen35-moe-vl": Tiny(
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": {
                key: value for key, value in _DELTA.items() if key != "intermediate_size"
            }
            | _EXPERTS
            | _MTP
            # All of its experts, since a token that rounding sends to another stays in the state.
            | {"num_experts_per_tok": 4}
            | {"rope_parameters": {**_DELTA["rope_parameters"], **_SECTIONS}},
            "vision_config": _VISION,
            "tie_word_embeddings": False,
        },
        save={"save_original_format": False},
        beside=_STACKED_BLOCK,
        routed=True,
    ),
}
