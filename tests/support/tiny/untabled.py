"""Families of transformers that have no table, to try on them what names and shapes tell."""

from __future__ import annotations

from support.tiny.base import BASE, LAYER_NORM, Tiny

_SMALL = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 1}
_GPT = {**_SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512}

UNTABLED: dict[str, Tiny] = {
    "gptj": Tiny("GPTJForCausalLM", {**_GPT, "n_inner": 96}),
    "codegen": Tiny("CodeGenForCausalLM", {**_GPT, "n_inner": 96}),
    "opt": Tiny(
        "OPTForCausalLM",
        {**LAYER_NORM, "ffn_dim": 96, "word_embed_proj_dim": 32, "pad_token_id": 2},
    ),
    "xglm": Tiny(
        "XGLMForCausalLM",
        {**_SMALL, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96,
         "max_position_embeddings": 512, "pad_token_id": 2},
    ),
    "zamba2": Tiny(
        "Zamba2ForCausalLM",
        {**BASE, "num_hidden_layers": 4, "num_key_value_heads": 4, "mamba_d_state": 16,
         "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3],
         "num_mem_blocks": 1, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16,
         "adapter_rank": 8, "tie_word_embeddings": True},
    ),
    "recurrent-gemma": Tiny(
        "RecurrentGemmaForCausalLM",
        {**_SMALL, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "lru_width": 64, "head_dim": 16,
         "attention_window_size": 16},
    ),
    "helium": Tiny("HeliumForCausalLM", {**BASE, "head_dim": 16}),
    "diffllama": Tiny("DiffLlamaForCausalLM", BASE),
    "minimax": Tiny(
        "MiniMaxForCausalLM",
        {**BASE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
         "layer_types": ["linear_attention", "full_attention"], "block_size": 32},
        routed=True,
    ),
    "jetmoe": Tiny(
        "JetMoeForCausalLM",
        {**BASE, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        routed=True,
    ),
}  # fmt: skip
