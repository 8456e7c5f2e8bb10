"""Shapes of state-space models and hybrids, made from their families' own tables.

The configurations are small ones of published models: rows of 256 or more, and enough layers for
the rules that go by a layer's place.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from support.llama_plan import Shape

from quantcli.archs import find_architecture
from quantcli.types import TensorInfo

BASE = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_HALVES = ["linear_attention", "full_attention"] * 6
_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 2, "mamba_d_state": 32}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_NEMOTRON = {
    "ssm_state_size": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "head_dim": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "lfm2moe-12": {
        "architectures": ["Lfm2MoeForCausalLM"],
        "layer_types": ["conv", "full_attention"] * 6,
        "moe_intermediate_size": 256,
        **_EXPERTS,
    },
    "granitemoe-12": {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "shared_intermediate_size": 512,
        **_EXPERTS,
    },
    "granitehybrid-12": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "layer_types": _HALVES,
        "shared_intermediate_size": 512,
        **_MIXER,
        **_EXPERTS,
    },
    "granitehybrid-12-dense": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "layer_types": _HALVES,
        "shared_intermediate_size": 512,
        "num_local_experts": 0,
        "tie_word_embeddings": True,
        **_MIXER,
    },
    "nemotron_h-12": {
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": "M-M*-M-M*-M-",
        **_NEMOTRON,
    },
    "nemotron_h_moe-12": {
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": "MEM*EMEM*EME",
        "n_routed_experts": 8,
        "moe_intermediate_size": 256,
        "moe_shared_expert_intermediate_size": 512,
        "moe_latent_size": 128,
        **_NEMOTRON,
    },
    "falcon-h1-12": {
        "architectures": ["FalconH1ForCausalLM"],
        "mamba_d_ssm": 512,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        **_MIXER,
    },
    "mamba-12": {"architectures": ["MambaForCausalLM"], "time_step_rank": 256},
    "mamba2-12": {
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": 8,
        "head_dim": 64,
        "n_groups": 2,
        "state_size": 32,
    },
    "jamba-12": {
        "architectures": ["JambaForCausalLM"],
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        **_EXPERTS,
    },
}


LAYERS = 12
"""Of every model here."""


class _Everything(Container[str]):
    """The tensors of a model without a block for further tokens, and with all others."""

    def __contains__(self, name: object) -> bool:
        return not str(name).startswith(f"blk.{LAYERS}.")


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The model of `config`, its output matrix among the tensors unless that is tied."""
    config = {**BASE, **config}
    family = find_architecture(config)
    tied = bool(config.get("tie_word_embeddings"))
    stored = {
        name: TensorInfo(name, shape, "F32", 0, Path("hollow"))
        for name, shape in family.stored(config, _Everything()).items()
        if not (tied and name == "lm_head.weight")
    }
    tensors = {tensor.name: tensor.shape for tensor in family.tensors(config, stored)}
    prefix = f"{family.name}."
    keys = {key.removeprefix(prefix): value.value for key, value in family.metadata(config).items()}
    return Shape(family.name, keys, tensors)
