"""What does not fit is refused in one sentence that names it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError
from quantcli.types import TensorInfo

FILE = Path("tiny/model.safetensors")

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (100, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (100, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.post_attention_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.k_proj.weight": (32, 64),
    "model.layers.0.self_attn.v_proj.weight": (32, 64),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
    "model.layers.0.mlp.gate_proj.weight": (96, 64),
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
}
OTHERS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "Gemma2ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "Gemma3ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "Lfm2ForCausalLM": {"block_multiple_of": 32},
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 256},
}


def stored(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, "BF16", 0, FILE) for name, shape in shapes.items()}


def refusal(config: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> str:
    """The sentence with which ``config`` (or its tensors, if given) is refused."""
    with pytest.raises(ArchitectureError) as caught:
        architecture = find_architecture(config)
        if shapes is None:
            architecture.metadata(config)
        else:
            architecture.tensors(config, stored(shapes))
    return str(caught.value)


def of_class(name: str, **patch: Any) -> dict[str, Any]:
    return {**LLAMA, **OTHERS.get(name, {}), "architectures": [name], **patch}


def test_the_samples_are_accepted() -> None:
    architecture = find_architecture(LLAMA)
    assert len(architecture.tensors(LLAMA, stored(SHAPES))) == len(SHAPES)
    for name in OTHERS:
        config = of_class(name)
        assert find_architecture(config).metadata(config)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["LlamaForCausal"],
            "architecture LlamaForCausal is not supported (convert it with llama.cpp's",
        ),
        (["Gemma9ForCausalLM"], "Gemma9ForCausalLM is not supported (convert it with llama.cpp's"),
        (["AlbertModel"], "architecture AlbertModel is not supported (convert it with llama.cpp's"),
        ([], 'config.json names no architecture (it needs a line such as "architectures"'),
        ("LlamaForCausalLM", "config.json names no architecture"),
        ([7], "config.json names no architecture"),
    ],
)
def test_unknown_architectures(names: Any, sentence: str) -> None:
    assert sentence in refusal({**LLAMA, "architectures": names})


def test_no_architectures_at_all() -> None:
    assert "config.json names no architecture" in refusal({"hidden_size": 64})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model.layers.0.mlp.up_proj.weight": None},
            "tensor model.layers.0.mlp.up_proj.weight is missing from tiny, "
            "and LlamaForCausalLM needs it",
        ),
        (
            {
                "model.layers.0.self_attn.v_proj.weight": None,
                "model.layers.0.self_attn.v_proj.qweight": (8, 32),
            },
            "needs it (it holds model.layers.0.self_attn.v_proj.qweight)",
        ),
        ({"lm_head.weight": None}, "tensor lm_head.weight is missing from tiny"),
        (
            {"model.layers.1.input_layernorm.weight": (64,)},
            "tensor model.layers.1.input_layernorm.weight of tiny/model.safetensors is not part of "
            "LlamaForCausalLM",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": (64,)},
            "tensor model.layers.0.self_attn.q_proj.bias of tiny/model.safetensors is not part of",
        ),
        (
            {"model.layers.0.mlp.down_proj.weight": (96, 64)},
            "tensor model.layers.0.mlp.down_proj.weight of tiny/model.safetensors has shape "
            "96×64, but config.json makes it 64×96",
        ),
        ({"model.norm.weight": ()}, "has shape (), but config.json makes it 64"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, tuple[int, ...] | None], sentence: str) -> None:
    shapes = {name: shape for name, shape in {**SHAPES, **change}.items() if shape is not None}
    assert sentence in refusal(LLAMA, shapes)


def test_a_flag_that_is_none() -> None:
    sentence = refusal({**LLAMA, "tie_word_embeddings": "no"}, SHAPES)
    assert "tie_word_embeddings of LlamaForCausalLM in config.json is 'no'" in sentence


def test_an_empty_checkpoint() -> None:
    assert "model.embed_tokens.weight is missing from the checkpoint" in refusal(LLAMA, {})


def mixtral_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {name: shape for name, shape in SHAPES.items() if ".mlp." not in name}
    block = "model.layers.0.block_sparse_moe"
    shapes[f"{block}.gate.weight"] = (2, 64)
    for expert in range(2):
        shapes |= {
            f"{block}.experts.{expert}.w1.weight": (96, 64),
            f"{block}.experts.{expert}.w2.weight": (64, 96),
            f"{block}.experts.{expert}.w3.weight": (96, 64),
        }
    return shapes


def test_a_missing_expert() -> None:
    shapes = mixtral_shapes()
    del shapes["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert "experts.1.w3.weight is missing" in refusal(of_class("MixtralForCausalLM"), shapes)


def test_an_expert_too_many() -> None:
    shapes = mixtral_shapes()
    shapes["model.layers.0.block_sparse_moe.experts.2.w3.weight"] = (96, 64)
    assert "experts.2.w3.weight of tiny/model.safetensors is not part of MixtralForCausalLM" in (
        refusal(of_class("MixtralForCausalLM"), shapes)
    )


def test_experts_of_two_types() -> None:
    config = of_class("MixtralForCausalLM")
    infos = stored(mixtral_shapes())
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    infos[name] = replace(infos[name], dtype="F16")
    with pytest.raises(ArchitectureError, match=r"ffn_gate_exps.* stored as BF16 and F16"):
        find_architecture(config).tensors(config, infos)


def test_the_same_tensor_twice() -> None:
    config = of_class("GPT2LMHeadModel")
    both = {"wte.weight": (100, 64), "transformer.wte.weight": (100, 64)}
    assert "holds both wte.weight and transformer.wte.weight" in refusal(config, both)


@pytest.mark.parametrize("key", sorted(LLAMA.keys() - {"architectures", "num_key_value_heads"}))
def test_a_missing_key(key: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != key}
    assert refusal(config) == f"config.json has no {key}, which LlamaForCausalLM needs"
    assert refusal({**LLAMA, key: None}) == refusal(config)


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.5, True, "64", [64], float("nan")])
def test_a_size_that_is_none(value: Any) -> None:
    sentence = refusal({**LLAMA, "vocab_size": value})
    assert sentence.startswith("vocab_size of LlamaForCausalLM in config.json is ")
    assert sentence.endswith("expected a whole number from 1 to 2147483647")


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        ({"rms_norm_eps": "small"}, "rms_norm_eps of LlamaForCausalLM in config.json is 'small'"),
        ({"rms_norm_eps": float("inf")}, "is inf, expected a finite number"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "hidden_size 64"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 attention heads of 16 over 3"),
        ({"head_dim": 15}, "4 attention heads of 15 over 2"),
        ({"num_hidden_layers": 513}, "has 513 layers, but llama.cpp takes at most 512"),
        ({"num_hidden_layers": 10**9}, "llama.cpp takes at most 512"),
        ({"hidden_act": "gelu"}, "config.json sets hidden_act to 'gelu', but llama.cpp computes"),
        ({"num_nextn_predict_layers": 1}, "config.json sets num_nextn_predict_layers to 1"),
        ({"rope_theta": 0}, "rope_theta of LlamaForCausalLM in config.json is 0.0"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 2.0}}, "sets the rope type 'ntk_alpha'"),
        ({"rope_scaling": {"type": "longrope"}}, "default, linear, llama3, yarn only"),
        ({"rope_scaling": {"type": "linear"}}, "config.json has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "expected a number above 0"),
        ({"rope_scaling": [1]}, "rope_parameters of LlamaForCausalLM in config.json is [1]"),
        ({"rope_parameters": {"mrope_section": [8, 8]}}, "sets the rope type 'mrope'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "differ by layer type, which LlamaForCausalLM does not have",
        ),
        ({"partial_rotary_factor": 0.5}, "sets partial_rotary_factor to 0.5"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16}},
            "sets beta_fast of yarn to 16, but llama.cpp computes LlamaForCausalLM with 32 only",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": -1.0}},
            "attention_factor of LlamaForCausalLM in config.json is -1.0",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}},
            "sets truncate to false for yarn",
        ),
    ],
)
def test_llama_configurations(patch: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal({**LLAMA, **patch})


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        ({"low_freq_factor": 5.0}, "0 < low_freq_factor ≤ high_freq_factor, found 8, 5 and 4"),
        ({"factor": 0.5}, "need factor ≥ 1"),
        ({"high_freq_factor": None}, "config.json has no high_freq_factor"),
    ],
)
def test_llama3_rotations(rope: dict[str, Any], sentence: str) -> None:
    whole = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert sentence in refusal({**LLAMA, "rope_scaling": {**whole, **rope}}, SHAPES)


@pytest.mark.parametrize(
    ("name", "patch", "sentence"),
    [
        ("MixtralForCausalLM", {"num_experts_per_tok": 3}, "sends a token to 3 of 2 experts"),
        ("MixtralForCausalLM", {"num_local_experts": None}, "no num_local_experts or num_experts"),
        ("MixtralForCausalLM", {"num_local_experts": 1025}, "has 1025 experts"),
        ("Qwen2ForCausalLM", {"head_dim": 32}, "has 4 heads of 32, but llama.cpp needs them"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "llama3"}}, "default, linear, yarn only"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "sets attention_bias to True"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "with True only"),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}, "sets decoder_sparse_step to 2"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, "sets mlp_only_layers to [0]"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar to 24"),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": None}, "no final_logit_softcapping"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types of Gemma2"),
        ("Gemma2ForCausalLM", {"tie_word_embeddings": False}, "with tied embeddings only"),
        ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "sets hidden_activation to 'gelu'"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "Gemma3ForCausalLM without it"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 4, "num_hidden_layers": 4}, "each 6th"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sets the rope type 'linear'",
        ),
        ("Gemma3ForCausalLM", {"text_config": 3}, "text_config in config.json is not an object"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "yarn"}}, "sets the rope type 'yarn'"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 1.5}, "rotates 24 of the 16 values"),
        ("GPT2LMHeadModel", {"n_head": 5}, "n_embd 64 of GPT2LMHeadModel"),
        ("GPT2LMHeadModel", {"activation_function": "gelu"}, "'gelu_new' or 'gelu_pytorch_tanh'"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "with False only"),
        ("GPT2LMHeadModel", {"n_positions": None}, "config.json has no n_positions or n_ctx"),
        ("Lfm2ForCausalLM", {"conv_bias": True}, "sets conv_bias to True"),
        (
            "Lfm2ForCausalLM",
            {"layer_types": ["conv", "conv"]},
            "expected one of full_attention and conv for each of 1 layers",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise(name: str, patch: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(of_class(name, **patch))


@pytest.mark.parametrize("factors", [[1.0] * 7, ["a"] * 8, [0.0] * 8, None])
def test_longrope_factors(factors: Any) -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": factors}
    config = of_class("Phi3ForCausalLM", rope_scaling=rope)
    assert "long_factor of Phi3ForCausalLM's rotation in config.json is" in refusal(config, {})
