"""Published models at their true sizes, without a weight: config.json, and files that are holes.

transformers makes each model on its meta device, which tells names and shapes; the files have true
headers and nothing behind them, so that 100 GB take a few kilobytes of disk. What a plan, an
overview or llama.cpp's own dry run says of them is what it says of the published model.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parent.parent / "data" / "bookworm-mini"


@dataclass(frozen=True)
class Published:
    """A class of transformers and what the publisher's config.json says that differs from it."""

    model: str
    config: Mapping[str, Any]
    config_class: str | None = None
    type: str = "Q4_K_M"
    """The type to try it in."""


def _dense(layers: int, hidden: int, inner: int, heads: int, key_heads: int, vocabulary: int,
           **more: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **more,
    }


PUBLISHED: dict[str, Published] = {
    "Llama-3.1-8B": Published("LlamaForCausalLM", _dense(32, 4096, 14336, 32, 8, 128256)),
    "Llama-3.2-1B": Published(
        "LlamaForCausalLM",
        _dense(16, 2048, 8192, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    ),
    "Mistral-7B-v0.3": Published("MistralForCausalLM", _dense(32, 4096, 14336, 32, 8, 32768)),
    "Qwen2.5-7B": Published("Qwen2ForCausalLM", _dense(28, 3584, 18944, 28, 4, 152064)),
    "Qwen3-14B": Published(
        "Qwen3ForCausalLM", _dense(40, 5120, 17408, 40, 8, 151936, head_dim=128)
    ),
    "Phi-3.5-mini": Published(
        "Phi3ForCausalLM",
        _dense(32, 3072, 8192, 32, 32, 32064, pad_token_id=0, max_position_embeddings=4096,
               sliding_window=262144),
    ),
    "gemma-2-9b": Published(
        "Gemma2ForCausalLM",
        _dense(42, 3584, 14336, 16, 8, 256000, head_dim=256, sliding_window=4096,
               tie_word_embeddings=True),
    ),
    "gemma-3-12b": Published(
        "Gemma3ForCausalLM",
        _dense(48, 3840, 15360, 16, 8, 262208, head_dim=256, sliding_window=1024,
               tie_word_embeddings=True),
        "Gemma3TextConfig",
    ),
    "OLMo-2-7B": Published("Olmo2ForCausalLM", _dense(32, 4096, 11008, 32, 32, 100352)),
    "c4ai-command-r7b": Published(
        "Cohere2ForCausalLM",
        _dense(32, 4096, 14336, 32, 8, 256000, sliding_window=4096, tie_word_embeddings=True),
    ),
    "Qwen3-30B-A3B": Published(
        "Qwen3MoeForCausalLM",
        _dense(48, 2048, 6144, 32, 4, 151936, head_dim=128, num_experts=128,
               num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True),
    ),
    "Mixtral-8x7B": Published("MixtralForCausalLM", _dense(32, 4096, 14336, 32, 8, 32000)),
    "gpt-oss-20b": Published(
        "GptOssForCausalLM",
        _dense(24, 2880, 2880, 64, 8, 201088, head_dim=64, num_local_experts=32,
               num_experts_per_tok=4, sliding_window=128),
        type="MXFP4_MOE",
    ),
    "DeepSeek-V2-Lite": Published(
        "DeepseekV2ForCausalLM",
        _dense(27, 2048, 10944, 16, 16, 102400, q_lora_rank=None, kv_lora_rank=512,
               qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64,
               n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
               first_k_dense_replace=1, topk_method="greedy", n_group=1, topk_group=1),
    ),
    "DeepSeek-V3": Published(
        "DeepseekV3ForCausalLM",
        _dense(61, 7168, 18432, 128, 128, 129280, q_lora_rank=1536, kv_lora_rank=512,
               qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256,
               n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
               first_k_dense_replace=3, n_group=8, topk_group=4),
    ),
    "Falcon-H1-7B": Published(
        "FalconH1ForCausalLM",
        _dense(44, 3072, 12288, 12, 2, 130048, head_dim=128, mamba_d_ssm=3072, mamba_n_heads=24,
               mamba_d_head=128, mamba_n_groups=2, mamba_d_state=256, mamba_d_conv=4),
    ),
    "granite-4.0-h-tiny": Published(
        "GraniteMoeHybridForCausalLM",
        _dense(40, 1536, 512, 12, 4, 100352, tie_word_embeddings=True, num_local_experts=64,
               num_experts_per_tok=6, shared_intermediate_size=1024, mamba_n_heads=48,
               mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, mamba_expand=2,
               position_embedding_type="nope",
               layer_types=["attention" if i % 10 == 5 else "mamba" for i in range(40)]),
    ),
    "LFM2-1.2B": Published(
        "Lfm2ForCausalLM",
        _dense(16, 2048, 12288, 32, 8, 65536, tie_word_embeddings=True, conv_L_cache=3,
               block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=1.0, block_multiple_of=256,
               full_attn_idxs=[2, 5, 8, 10, 12, 14],
               layer_types=["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv"
                            for i in range(16)]),
    ),
    "Qwen3-Next-80B-A3B": Published(
        "Qwen3NextForCausalLM",
        _dense(48, 2048, 5120, 16, 2, 151936, head_dim=256, num_experts=512,
               num_experts_per_tok=10, moe_intermediate_size=512,
               shared_expert_intermediate_size=512),
    ),
    "Nemotron-H-8B": Published(
        "NemotronHForCausalLM",
        _dense(52, 4096, 21504, 32, 8, 131072, head_dim=128, mamba_num_heads=128,
               mamba_head_dim=64, ssm_state_size=128, n_groups=8,
               layers_block_type=[
                   {"M": "mamba", "-": "mlp", "*": "attention"}[kind] for kind in
                   "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"]),
    ),
    "mamba-2.8b": Published(
        "MambaForCausalLM",
        {"num_hidden_layers": 64, "hidden_size": 2560, "intermediate_size": 5120, "state_size": 16,
         "conv_kernel": 4, "time_step_rank": 160, "vocab_size": 50280,
         "tie_word_embeddings": True},
    ),
    "starcoder2-7b": Published(
        "Starcoder2ForCausalLM",
        _dense(32, 4608, 18432, 36, 4, 49152, use_bias=True, sliding_window=4096),
    ),
    "gpt2-xl": Published(
        "GPT2LMHeadModel", {"n_layer": 48, "n_embd": 1600, "n_head": 25, "vocab_size": 50257}
    ),
    "pythia-6.9b": Published(
        "GPTNeoXForCausalLM",
        {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 16384,
         "num_attention_heads": 32, "vocab_size": 50432, "tie_word_embeddings": False},
    ),
    "GLM-4.5-Air": Published(
        "Glm4MoeForCausalLM",
        _dense(46, 4096, 10944, 96, 8, 151552, head_dim=128, n_routed_experts=128,
               num_experts_per_tok=8, moe_intermediate_size=1408, n_shared_experts=1,
               first_k_dense_replace=1, n_group=1, topk_group=1, attention_bias=True,
               partial_rotary_factor=0.5),
    ),
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """Write config.json, a safetensors file with a hole for its weights, and a tokenizer."""
    import torch
    import transformers

    wanted = PUBLISHED[name]
    named = wanted.config_class or wanted.model.replace("ForCausalLM", "Config").replace(
        "LMHeadModel", "Config"
    )
    config = getattr(transformers, named)(**copy.deepcopy(dict(wanted.config)))
    with torch.device("meta"):
        model = getattr(transformers, wanted.model)(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [wanted.model]
    config.save_pretrained(folder)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    tied = tied if config.tie_word_embeddings else set()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    stored = {key: ("BF16", 2, shape) for key, shape in shapes.items() if key not in tied}
    if wanted.type == "MXFP4_MOE":
        stored = dict(each for key in stored for each in _packed(key, stored[key]))
        settings = json.loads((folder / "config.json").read_text())
        settings["quantization_config"] = {"quant_method": "mxfp4"}
        (folder / "config.json").write_text(json.dumps(settings))
    _write_hollow(folder, stored)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    return folder


_Stored = tuple[str, int, tuple[int, ...]]
"""A dtype, its bytes and a shape."""


def _packed(key: str, stored: _Stored) -> Iterator[tuple[str, _Stored]]:
    """Stacks of experts as gpt-oss is published: blocks of 32 inputs, and their scales."""
    shape = stored[2]
    if key.endswith("_proj") and len(shape) == 3:
        experts, inputs, outputs = shape
        yield f"{key}_blocks", ("U8", 1, (experts, outputs, inputs // 32, 16))
        yield f"{key}_scales", ("U8", 1, (experts, outputs, inputs // 32))
    else:
        yield key, stored


def _write_hollow(folder: Path, stored: Mapping[str, _Stored]) -> None:
    header, end = {}, 0
    for key, (dtype, size, shape) in stored.items():
        size *= math.prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)
