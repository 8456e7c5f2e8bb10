"""State-space layers, short convolutions, and the hybrids of these with attention."""

from __future__ import annotations

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
}
