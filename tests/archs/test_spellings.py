"""Published files spell and omit things in several ways; the outcome is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError
from quantcli.types import TensorInfo

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def keys(config: dict[str, Any]) -> dict[str, Any]:
    found = find_architecture(config).metadata(config)
    return {key.split(".", 1)[1]: value.value for key, value in found.items()}


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 500000.0}, {"rope_type": "default", "rope_theta": 500000.0}),
        ({"rope_theta": 5000.0, "rope_scaling": None}, {"rope_theta": 5000.0}),
        (
            {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        ),
        (
            {
                "rope_theta": 1e6,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e6,
            },
        ),
        ({}, {"rope_type": "default"}),
    ],
)
def test_rotations(older: dict[str, Any], newer: dict[str, Any]) -> None:
    assert keys({**LLAMA, **older}) == keys({**LLAMA, "rope_parameters": newer})


def test_as_many_key_value_heads_as_heads_unless_said() -> None:
    assert keys(LLAMA)["attention.head_count_kv"] == 4


def test_rotation_defaults() -> None:
    assert keys(LLAMA)["rope.freq_base"] == 10000.0
    mixtral = {"num_local_experts": 2, "num_experts_per_tok": 2}
    config = {**LLAMA, **mixtral, "architectures": ["MixtralForCausalLM"]}
    assert keys(config)["rope.freq_base"] == 1e6


def test_gemma3_as_published() -> None:
    """google/gemma-3-4b-it leaves most of its text_config to transformers' defaults."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152},
    }
    assert keys(config) == {
        "vocab_size": 262208,
        "context_length": 131072,
        "embedding_length": 2560,
        "block_count": 34,
        "feed_forward_length": 10240,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 1024,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 10000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }


@pytest.mark.parametrize(
    ("name", "layers", "scalar"),
    [("Gemma2ForCausalLM", 46, 144), ("Gemma3ForCausalLM", 62, 168)],
)
def test_the_27b_models_scale_attention_otherwise(name: str, layers: int, scalar: int) -> None:
    config = {
        **LLAMA,
        "architectures": [name],
        "hidden_size": 32 * scalar,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "num_hidden_layers": layers,
        "query_pre_attn_scalar": scalar,
    }
    assert keys(config)["block_count"] == layers


def stored(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {n: TensorInfo(n, s, "F32", 0, Path("model.safetensors")) for n, s in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_with_and_without_a_prefix(prefix: str) -> None:
    """openai-community/gpt2 has no prefix and stores the causal mask."""
    config = {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": 100, "n_embd": 64, "n_layer": 1,
        "n_head": 4, "n_ctx": 32, "n_positions": 32,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (100, 64), "wpe.weight": (32, 64), "ln_f.weight": (64,), "ln_f.bias": (64,),
        "h.0.ln_1.weight": (64,), "h.0.ln_1.bias": (64,), "h.0.ln_2.weight": (64,),
        "h.0.ln_2.bias": (64,), "h.0.attn.bias": (1, 1, 32, 32), "h.0.attn.masked_bias": (),
        "h.0.attn.c_attn.weight": (64, 192), "h.0.attn.c_attn.bias": (192,),
        "h.0.attn.c_proj.weight": (64, 64), "h.0.attn.c_proj.bias": (64,),
        "h.0.mlp.c_fc.weight": (64, 256), "h.0.mlp.c_fc.bias": (256,),
        "h.0.mlp.c_proj.weight": (256, 64), "h.0.mlp.c_proj.bias": (64,),
    }  # fmt: skip
    infos = stored({prefix + name: shape for name, shape in shapes.items()})
    tensors = {t.name: t for t in find_architecture(config).tensors(config, infos)}
    assert len(tensors) == len(shapes) - 2
    assert tensors["blk.0.ffn_up.weight"].shape == (256, 64)
    assert tensors["blk.0.ffn_up.weight"].pieces[0].source == f"{prefix}h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("tied", "held", "written"),
    [(True, False, False), (True, True, True), (False, True, True)],
)
def test_the_output_matrix(tied: bool, held: bool, written: bool) -> None:
    """Without one llama.cpp takes the embeddings; one that is held may differ from them."""
    config = {**LLAMA, "tie_word_embeddings": tied}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
        **{f"model.layers.0.self_attn.{x}_proj.weight": (64, 64) for x in "qkvo"},
        "model.layers.0.mlp.gate_proj.weight": (96, 64),
        "model.layers.0.mlp.up_proj.weight": (96, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 96),
    }  # fmt: skip
    if held:
        shapes["lm_head.weight"] = (100, 64)
    tensors = find_architecture(config).tensors(config, stored(shapes))
    assert ("output.weight" in {t.name for t in tensors}) is written


@pytest.mark.parametrize(
    ("name", "patch", "expected"),
    [
        ("LlamaForCausalLM", {}, 0),
        ("MistralForCausalLM", {"sliding_window": 128}, 1),
        ("MistralForCausalLM", {"sliding_window": 256}, 0),
        ("MistralForCausalLM", {"sliding_window": None}, 0),
        ("Qwen2ForCausalLM", {"sliding_window": 128, "use_sliding_window": False}, 0),
        ("Qwen2ForCausalLM", {"sliding_window": 128, "use_sliding_window": True}, 1),
        ("Phi3ForCausalLM", {"sliding_window": 128}, 1),
    ],
)
def test_notes_on_windows_that_llama_cpp_does_not_apply(
    name: str, patch: dict[str, Any], expected: int
) -> None:
    config = {**LLAMA, "architectures": [name], **patch}
    notes = find_architecture(config).notes(config)
    assert len(notes) == expected
    assert all("sliding window of 128 tokens" in note for note in notes)


LFM2: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Lfm2ForCausalLM"],
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "block_multiple_of": 32,
}


def test_layers_with_attention_of_lfm2() -> None:
    older = keys({**LFM2, "full_attn_idxs": [1]})
    newer = keys({**LFM2, "layer_types": ["conv", "full_attention", "conv"]})
    assert older == newer
    assert older["attention.head_count_kv"] == [0, 2, 0]
    assert keys(LFM2)["attention.head_count_kv"] == [2, 2, 2]


@pytest.mark.parametrize(
    ("spelling", "size"),
    [
        ({}, 64),
        ({"block_ff_dim": 120}, 96),
        ({"block_ffn_dim_multiplier": 1.5}, 96),
        ({"block_auto_adjust_ff_dim": False}, 96),
    ],
)
def test_feed_forward_lengths_of_lfm2(spelling: dict[str, Any], size: int) -> None:
    assert keys({**LFM2, **spelling})["feed_forward_length"] == size


@pytest.mark.parametrize("spelling", ["tie_word_embeddings", "tie_embedding"])
def test_an_untied_head_of_lfm2(spelling: str) -> None:
    names = find_architecture(LFM2).stored({**LFM2, spelling: False}, ())
    assert "lm_head.weight" in names
    assert "lm_head.weight" not in find_architecture(LFM2).stored({**LFM2, spelling: True}, ())


QWEN3_5: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 100, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128,
    "linear_num_value_heads": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "factor", "given", "expected"),
    [
        (256, 0.25, None, [11, 11, 10, 0]), (256, 0.25, [11, 11, 10], [11, 11, 10, 0]),
        (64, 0.5, None, [11, 11, 10, 0]), (16, 0.5, None, [2, 1, 1, 0]),
        (16, 1.0, None, [3, 3, 2, 0]), (64, 0.5, [6, 5, 5, 0], [6, 5, 5, 0]),
    ],
)  # fmt: skip
def test_shares_of_a_rotation_reach_every_frequency(
    head_dim: int, factor: float, given: list[int] | None, expected: list[int]
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": factor}
    if given:
        rope["mrope_section"] = given
    found = keys({**QWEN3_5, "head_dim": head_dim, "rope_parameters": rope})
    assert found["rope.dimension_sections"] == expected


@pytest.mark.parametrize("given", [[4, 0, 0], [11, 11], [40, 40, 40], "x", [8, -1, 8], [2, 9, 9]])
def test_shares_that_leave_a_frequency_out_are_refused(given: object) -> None:
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": given}
    with pytest.raises(ArchitectureError, match="mrope_section of Qwen3_5ForCausalLM"):
        keys({**QWEN3_5, "rope_parameters": rope})


def test_attention_stands_where_old_files_say_by_an_interval() -> None:
    found = keys({**QWEN3_5, "full_attention_interval": 2})
    assert found["attention.recurrent_layers"] == [True, False, True, False]
    found = keys({**QWEN3_5, "layer_types": ["full_attention", *["linear_attention"] * 3]})
    assert found["attention.recurrent_layers"] == [False, True, True, True]
    for wrong in (["full_attention"], ["conv"] * 4, "linear_attention"):
        with pytest.raises(ArchitectureError, match="layer_types of Qwen3_5ForCausalLM"):
            keys({**QWEN3_5, "layer_types": wrong})


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 3}, {"layer_types": ["full_attention"] * 4}]
)
def test_layers_of_one_kind_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError, match="with layers of both kinds only"):
        keys({**QWEN3_5, **change})


def test_heads_of_a_delta_net_have_one_size() -> None:
    for change in ({"linear_value_head_dim": 64}, {"linear_num_value_heads": 17}):
        with pytest.raises(ArchitectureError, match="needs one size and a multiple"):
            keys({**QWEN3_5, **change})
