"""State-space models and hybrids: older spellings, and what llama.cpp would compute otherwise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.state_space_shapes import BASE, CONFIGS

from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError
from quantcli.types import TensorInfo


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A configuration of `CONFIGS`; a change to None takes a key out."""
    found = {**BASE, **CONFIGS[name], **changes}
    return {key: value for key, value in found.items() if value is not None}


def keys(config: dict[str, Any]) -> dict[str, Any]:
    found = find_architecture(config).metadata(config)
    return {key.split(".", 1)[1]: value.value for key, value in found.items()}


REFUSED = [
    ("lfm2moe-12", {"use_expert_bias": False}, "use_expert_bias"),
    ("lfm2moe-12", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("lfm2moe-12", {"routed_scaling_factor": 2.0}, "routed_scaling_factor"),
    ("lfm2moe-12", {"num_dense_layers": 12}, "num_dense_layers"),
    ("lfm2moe-12", {"conv_bias": True}, "conv_bias"),
    ("granitemoe-12", {"num_experts_per_tok": 5}, "5 of 4 experts"),
    ("granitehybrid-12", {"mamba_expand": 3}, "mamba_expand"),
    ("granitehybrid-12", {"mamba_conv_bias": False}, "mamba_conv_bias"),
    ("granitehybrid-12", {"mamba_proj_bias": True}, "mamba_proj_bias"),
    ("granitehybrid-12", {"mamba_d_head": 32}, "8 mixer heads of 32"),
    ("granitehybrid-12", {"mamba_n_heads": 7, "mamba_d_head": "auto"}, "7 heads in 2 groups"),
    ("granitehybrid-12", {"time_step_limit": [0.0, 0.5]}, "time_step_limit"),
    ("granitehybrid-12", {"position_embedding_type": "alibi"}, "position_embedding_type"),
    ("granitehybrid-12", {"layer_types": ["mamba"] * 11}, "layer_types"),
    ("granitehybrid-12", {"layer_types": ["mlp"] * 12}, "layer_types"),
    ("granitehybrid-12", {"layer_types": ["attention"] * 12}, "position_embedding_type"),
    ("nemotron_h-12", {"hybrid_override_pattern": "M-M*-M-M*-MX"}, "layers_block_type"),
    ("nemotron_h-12", {"hybrid_override_pattern": None}, "layers_block_type"),
    ("nemotron_h-12", {"hybrid_override_pattern": "M-E*"}, "of kind mlp and of kind moe"),
    ("nemotron_h-12", {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
    ("nemotron_h-12", {"use_bias": True}, "use_bias"),
    ("nemotron_h-12", {"use_conv_bias": False}, "use_conv_bias"),
    ("nemotron_h_moe-12", {"n_group": 2, "topk_group": 1}, "n_group"),
    ("nemotron_h_moe-12", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
    ("falcon-h1-12", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate"),
    ("falcon-h1-12", {"ssm_multipliers": [1.0, 2.0]}, "ssm_multipliers"),
    ("falcon-h1-12", {"key_multiplier": 0}, "multiplier"),
    ("falcon-h1-12", {"projectors_bias": True}, "projectors_bias"),
    (
        "falcon-h1-12",
        {"tie_word_embeddings": True, "lm_head_multiplier": 0.5},
        "lm_head_multiplier to 0.5",
    ),
    ("mamba-12", {"intermediate_size": None, "expand": 4}, "mixers 1024 wide"),
    ("mamba-12", {"intermediate_size": 768}, "mixers 768 wide"),
    ("mamba-12", {"use_bias": True}, "use_bias"),
    ("mamba-12", {"time_step_rank": "small"}, "time_step_rank"),
    ("mamba2-12", {"time_step_limit": [0.001, math.inf]}, "time_step_limit"),
    ("mamba2-12", {"n_groups": 3}, "in 3 groups"),
    ("jamba-12", {"attn_layer_offset": 4}, "attn_layer_offset"),
    ("jamba-12", {"head_dim": 128}, "4 heads of 128"),
    ("jamba-12", {"mamba_conv_bias": False}, "mamba_conv_bias"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=str)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    assert keys(config_of(name))
    with pytest.raises(ArchitectureError, match=message):
        keys(config_of(name, **changes))


@pytest.mark.parametrize(
    "unlimited", [[0.0, math.inf], (0.0, math.inf), [0.0, {"__float__": "Infinity"}]], ids=str
)
def test_time_steps_without_limits_have_several_spellings(unlimited: Any) -> None:
    for name in ("granitehybrid-12", "nemotron_h-12", "falcon-h1-12", "mamba2-12"):
        assert keys(config_of(name, time_step_limit=unlimited)) == keys(config_of(name))


def test_both_generations_names_of_layers() -> None:
    older = ["mamba", "attention"] * 6
    for key in ("layer_types", "layers_block_type"):
        config = config_of("granitehybrid-12", **{"layer_types": None, key: older})
        assert keys(config) == keys(config_of("granitehybrid-12"))
    pattern = {"M": "mamba", "-": "mlp", "*": "attention"}
    kinds = [pattern[letter] for letter in CONFIGS["nemotron_h-12"]["hybrid_override_pattern"]]
    config = config_of("nemotron_h-12", hybrid_override_pattern=None, layers_block_type=kinds)
    assert keys(config) == keys(config_of("nemotron_h-12"))
    older_sizes = {"n_groups": None, "mamba_n_groups": 2}
    assert keys(config_of("nemotron_h-12", **older_sizes)) == keys(config_of("nemotron_h-12"))


def test_a_class_may_be_several_architectures() -> None:
    hybrid = config_of("granitehybrid-12")
    attention = {**hybrid, "layer_types": ["attention"] * 12, "position_embedding_type": "rope"}
    dense = {**attention, "num_local_experts": 0}
    names = [find_architecture(config).name for config in (hybrid, attention, dense)]
    assert names == ["granitehybrid", "granitemoe", "granite"]
    names = [find_architecture(config_of(f"{name}-12")).name for name in ("nemotron_h", "mamba2")]
    assert names == ["nemotron_h", "mamba2"]
    assert find_architecture(config_of("nemotron_h_moe-12")).name == "nemotron_h_moe"


def test_attention_without_positions_is_said() -> None:
    dense = config_of("granitehybrid-12-dense")
    assert keys(dense)["rope.scaling.finetuned"] is False
    rotated = {**dense, "position_embedding_type": "rope"}
    assert keys(rotated)["rope.scaling.finetuned"] is True


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.backbone."])
def test_names_of_mamba_checkpoints(prefix: str) -> None:
    config = config_of("mamba2-12", num_hidden_layers=1)
    family = find_architecture(config)
    named = family.stored(config, ()).items()
    respelled = {name.replace("backbone.", prefix): shape for name, shape in named}
    stored = {
        name: TensorInfo(name, shape, "F32", 0, Path("x")) for name, shape in respelled.items()
    }
    found = {tensor.name for tensor in family.tensors(config, stored)}
    assert {"token_embd.weight", "blk.0.ssm_in.weight", "output_norm.weight"} <= found


def test_what_differs_from_transformers_is_said() -> None:
    falcon = config_of("mamba-12", architectures=["FalconMambaForCausalLM"])
    (note,) = find_architecture(falcon).notes(falcon)
    assert "mixer_rms_eps 1e-06" in note
    assert find_architecture(falcon).notes({**falcon, "mixer_rms_eps": 1e-5}) == ()
    nemotron = config_of("nemotron_h-12")
    (note,) = find_architecture(nemotron).notes(nemotron)
    assert "time_step_min 0.001" in note
    assert find_architecture(nemotron).notes({**nemotron, "time_step_min": 0.0}) == ()


def test_the_width_of_a_mamba_counts_before_its_expansion() -> None:
    for name in ("MambaForCausalLM", "FalconMambaForCausalLM"):
        config = config_of("mamba-12", architectures=[name])
        assert keys({**config, "expand": 16}) == keys(config)
        assert keys(config)["ssm.inner_size"] == 2 * config["hidden_size"]
