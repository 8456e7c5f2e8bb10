"""Tiny models of every architecture, with random weights, as transformers itself saves them.

Each is a folder of config.json, model.safetensors and the tokenizer of tests/data/bookworm-mini,
whose vocabulary size they all have. Weights are drawn wide enough that logits are not flat: a
swapped row or a wrong rotation shows at once. Epsilons and rotation bases are unusual and large,
so that a default taken in their place shows too.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parent.parent / "data" / "bookworm-mini"
VOCAB = 4096

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rms_norm_eps": 0.01,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
}
_LAYER_NORM = {key: value for key, value in _BASE.items() if key != "rms_norm_eps"}
_HALF_ROPE = {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 0.5}
_MROPE = {"rope_type": "default", "rope_theta": 3000.0, "mrope_section": [3, 3, 2]}
_GEMMA = {
    **_BASE,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "tie_word_embeddings": True,
}
_GEMMA3 = {
    **_GEMMA,
    "num_hidden_layers": 6,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 30000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
    },
}
_EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 3000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 3000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 2.0}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 3000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.05 * i for i in range(12)],
    "long_factor": [1.5 + 0.5 * i for i in range(12)],
    "original_max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Tiny:
    """A model class of transformers, its configuration, and how the checkpoint is written."""

    model: str
    config: dict[str, Any]
    config_class: str = ""
    save: dict[str, Any] = field(default_factory=dict)


MODELS: dict[str, Tiny] = {
    "llama": Tiny(
        "LlamaForCausalLM",
        _BASE
        | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
        | {"max_position_embeddings": 2048},
    ),
    "llama-tied": Tiny("LlamaForCausalLM", _BASE | {"tie_word_embeddings": True}),
    "llama-biases": Tiny(
        "LlamaForCausalLM",
        _BASE | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama-llama3": Tiny(
        "LlamaForCausalLM", _BASE | {"head_dim": 32, "rope_parameters": _LLAMA3_ROPE}
    ),
    "llama-yarn": Tiny("LlamaForCausalLM", _BASE | {"head_dim": 32, "rope_parameters": _YARN_ROPE}),
    "llama-linear": Tiny("LlamaForCausalLM", _BASE | {"rope_parameters": _LINEAR_ROPE}),
    "mistral": Tiny(
        "MistralForCausalLM",
        _BASE | {"num_attention_heads": 8, "head_dim": 32, "sliding_window": None},
    ),
    "mixtral": Tiny("MixtralForCausalLM", _BASE | _EXPERTS | {"num_local_experts": 4}),
    "mixtral-stacked": Tiny(
        "MixtralForCausalLM",
        _BASE | _EXPERTS | {"num_local_experts": 4},
        save={"save_original_format": False},
    ),
    "qwen2": Tiny("Qwen2ForCausalLM", dict(_BASE)),
    "qwen2-yarn": Tiny(
        "Qwen2ForCausalLM",
        _BASE | {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": _YARN_ROPE},
    ),
    "qwen3": Tiny("Qwen3ForCausalLM", _BASE | {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": Tiny(
        "Qwen3MoeForCausalLM",
        _BASE
        | _EXPERTS
        | {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen3-moe-stacked": Tiny(
        "Qwen3MoeForCausalLM",
        _BASE
        | _EXPERTS
        | {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
        save={"save_original_format": False},
    ),
    "gemma2": Tiny(
        "Gemma2ForCausalLM",
        _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": Tiny("Gemma3ForCausalLM", _GEMMA3, config_class="Gemma3TextConfig"),
    "gemma3-linear": Tiny(
        "Gemma3ForCausalLM",
        _GEMMA3
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 30000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
        config_class="Gemma3TextConfig",
    ),
    "gemma3-full": Tiny(
        "Gemma3ForCausalLM",
        _GEMMA3 | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        config_class="Gemma3TextConfig",
    ),
    "gemma3-images": Tiny(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _GEMMA3 | {"model_type": "gemma3_text"},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "boi_token_index": VOCAB - 3,
            "eoi_token_index": VOCAB - 2,
            "image_token_index": VOCAB - 1,
        },
        save={"save_original_format": False},
    ),
    "phi3": Tiny("Phi3ForCausalLM", _BASE | {"pad_token_id": 0}),
    "phi3-longrope": Tiny(
        "Phi3ForCausalLM",
        _BASE
        | {"pad_token_id": 0, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"original_max_position_embeddings": 256, "rope_parameters": _LONG_ROPE}
        | {"max_position_embeddings": 1024},
    ),
    "granite": Tiny(
        "GraniteForCausalLM",
        _BASE
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4}
        | {"attention_multiplier": 0.125, "logits_scaling": 0.5},
    ),
    "smollm3": Tiny(
        "SmolLM3ForCausalLM",
        _BASE | {"num_hidden_layers": 4, "tie_word_embeddings": True, "pad_token_id": 0},
    ),
    "seed-oss": Tiny("SeedOssForCausalLM", _BASE | {"head_dim": 32, "attention_out_bias": False}),
    "arcee": Tiny("ArceeForCausalLM", dict(_BASE)),
    "olmo2": Tiny("Olmo2ForCausalLM", _BASE | {"pad_token_id": 0}),
    "olmo3": Tiny(
        "Olmo3ForCausalLM",
        _BASE | {"pad_token_id": 0, "num_hidden_layers": 4, "sliding_window": 16},
    ),
    "olmo3-yarn": Tiny(
        "Olmo3ForCausalLM",
        _BASE
        | {"pad_token_id": 0, "num_hidden_layers": 4, "sliding_window": 16}
        | {
            "rope_parameters": {
                "full_attention": _YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
    ),
    "gemma": Tiny("GemmaForCausalLM", _BASE | {"head_dim": 32, "tie_word_embeddings": True}),
    "cohere": Tiny(
        "CohereForCausalLM",
        _LAYER_NORM | {"layer_norm_eps": 0.01, "logit_scale": 0.25, "tie_word_embeddings": True},
    ),
    "cohere2": Tiny(
        "Cohere2ForCausalLM",
        _LAYER_NORM
        | {"layer_norm_eps": 0.01, "logit_scale": 0.25, "tie_word_embeddings": True}
        | {"num_hidden_layers": 4, "sliding_window": 16},
    ),
    "nemotron": Tiny(
        "NemotronForCausalLM",
        _LAYER_NORM | {"norm_eps": 0.01, "rope_parameters": _HALF_ROPE},
    ),
    "nemotron-biases": Tiny(
        "NemotronForCausalLM",
        _LAYER_NORM
        | {"norm_eps": 0.01, "rope_parameters": _HALF_ROPE}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "starcoder2": Tiny(
        "Starcoder2ForCausalLM",
        _LAYER_NORM | {"norm_epsilon": 0.01, "sliding_window": None, "tie_word_embeddings": True},
    ),
    "stablelm": Tiny(
        "StableLmForCausalLM",
        _LAYER_NORM | {"layer_norm_eps": 0.01, "use_qkv_bias": True, "rope_parameters": _HALF_ROPE},
    ),
    "phi2": Tiny(
        "PhiForCausalLM",
        _LAYER_NORM | {"layer_norm_eps": 0.01, "rope_parameters": _HALF_ROPE},
        config_class="PhiConfig",
    ),
    "glm4": Tiny(
        "Glm4ForCausalLM",
        _BASE | {"head_dim": 16, "attention_bias": True, "rope_parameters": _HALF_ROPE},
    ),
    "glm": Tiny(
        "GlmForCausalLM",
        _BASE
        | {"head_dim": 16, "attention_bias": True, "pad_token_id": 0}
        | {"rope_parameters": _HALF_ROPE},
    ),
    "ernie4_5": Tiny(
        "Ernie4_5ForCausalLM",
        _BASE | {"head_dim": 32, "pad_token_id": 0, "tie_word_embeddings": True},
    ),
    "exaone4": Tiny(
        "Exaone4ForCausalLM",
        _BASE
        | {"sliding_window": None, "layer_types": ["full_attention"] * 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": _LLAMA3_ROPE},
    ),
    "olmoe": Tiny(
        "OlmoeForCausalLM",
        _BASE | _EXPERTS | {"num_experts": 4, "num_key_value_heads": 4, "norm_topk_prob": False},
    ),
    "qwen2-moe": Tiny(
        "Qwen2MoeForCausalLM",
        _BASE
        | _EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "qwen2-vl": Tiny(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": _BASE | {"rms_norm_eps": 1e-6, "rope_parameters": _MROPE},
            "vision_config": _VISION | {"depth": 1, "out_hidden_size": 64, "num_heads": 2},
            "image_token_id": VOCAB - 1,
            "video_token_id": VOCAB - 2,
            "vision_start_token_id": VOCAB - 3,
        },
    ),
    "qwen3-vl": Tiny(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": _BASE | {"head_dim": 16, "rope_parameters": _MROPE},
            "vision_config": _VISION
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
            "text_config": _BASE | {"model_type": "qwen2"},
            "vision_config": _VISION | {"model_type": "clip_vision_model"},
            "image_token_index": VOCAB - 1,
        },
    ),
    "mistral3": Tiny(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": _BASE | {"model_type": "mistral", "sliding_window": None},
            "vision_config": _VISION | {"model_type": "pixtral"},
            "image_token_index": VOCAB - 1,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2": Tiny(
        "Lfm2ForCausalLM",
        {key: value for key, value in _BASE.items() if key != "rms_norm_eps"}
        | {"num_hidden_layers": 4, "norm_eps": 0.01, "block_multiple_of": 32}
        | {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
        | {"tie_word_embeddings": True},
    ),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
        | {"bos_token_id": 0, "eos_token_id": 1, "layer_norm_epsilon": 0.01},
    ),
}


def build(
    name: str, folder: Path, *, dtype: str = "float32", seed: int = 1,
    changes: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write the checkpoint of ``MODELS[name]`` into ``folder``, in float32 or bfloat16.

    ``changes`` replaces settings of its configuration.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tiny = MODELS[name]
    config_class = tiny.config_class or tiny.model.replace("ForCausalLM", "Config").replace(
        "ForConditionalGeneration", "Config"
    ).replace("LMHeadModel", "Config")
    # Some classes change the dictionaries that they are given.
    settings = copy.deepcopy(tiny.config | dict(changes or {}))
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, tiny.model)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for label, weight in model.named_parameters():
            weight.copy_(_draw(label, weight, generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder, **tiny.save)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    return folder


def _draw(label: str, weight: Any, generator: Any) -> Any:
    import torch

    noise = torch.randn(weight.shape, generator=generator)
    if label.endswith("bias"):
        return 0.2 * noise
    if weight.ndim == 1:
        # Gemma's norms multiply by 1 + weight, so theirs are around 0 already.
        return weight.round() + 0.2 * noise
    if "embed" in label or "wte" in label or "wpe" in label:
        return 0.5 * noise
    return 1.5 / math.sqrt(weight.shape[-1]) * noise
