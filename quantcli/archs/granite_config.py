"""The way back to config.json of every Granite, whose classes share GGUF's architectures.

Granite 4's class, whose layers may be state-space ones, has experts or none and attention with or
without positions. Where all its layers are attention it is written as a "granite" or "granitemoe";
what gives it away is the key-value that says whether positions are rotated. A Bamba has that, but
no multipliers.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.decoder import decoder_config
from quantcli.archs.header import Header
from quantcli.archs.mamba_mixer import mamba2_config

MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
ROTATES = "rope.scaling.finetuned"
"""By this llama.cpp's Granites tell attention with positions from one without."""
SHARED = "expert_shared_feed_forward_length"
ATTENTION, MAMBA = "full_attention", "linear_attention"


def rebuilt(header: Header) -> dict[str, Any]:
    """config.json's keys for whichever class the key-values belong to."""
    keys = header.keys
    if ROTATES in keys:
        return _hybrid(header)
    model, model_type = "GraniteForCausalLM", "granite"
    if keys.get("expert_count"):
        model, model_type = "GraniteMoeForCausalLM", "granitemoe"
    if keys.get(SHARED):
        model, model_type = "GraniteMoeSharedForCausalLM", "granitemoeshared"
    return _decoder(header, model, model_type)


def _decoder(header: Header, model: str, model_type: str) -> dict[str, Any]:
    return {
        **decoder_config(header, model, model_type),
        **header.named(
            num_local_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            shared_intermediate_size=SHARED,
            **MULTIPLIERS,
        ),
    }


def _hybrid(header: Header) -> dict[str, Any]:
    config = _decoder(header, "GraniteMoeHybridForCausalLM", "granitemoehybrid")
    heads = config.get("num_key_value_heads", 0)
    each = heads if isinstance(heads, list) else [heads] * config.get("num_hidden_layers", 0)
    if MULTIPLIERS["logits_scaling"] not in header.keys:
        return {
            **config,
            **mamba2_config(header),
            "architectures": ["BambaForCausalLM"],
            "model_type": "bamba",
            "num_key_value_heads": max(each, default=0),
            "attn_layer_indices": [index for index, count in enumerate(each) if count],
        }
    return {
        **config,
        **mamba2_config(header),
        "num_local_experts": config.get("num_local_experts", 0),
        "num_key_value_heads": max(each, default=0),
        "layer_types": [ATTENTION if count else MAMBA for count in each],
        "position_embedding_type": "rope" if header.keys[ROTATES] else None,
    }
