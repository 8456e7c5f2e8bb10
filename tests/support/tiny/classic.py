"""The decoders before Llama: LayerNorms, learned positions or ALiBi, q, k and v in one matrix."""

from __future__ import annotations

from support.tiny.base import BASE, HALF_ROPE, LAYER_NORM, LINEAR_ROPE, VOCAB, Tiny

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
_GPT = _TOKENS | {
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "layer_norm_epsilon": 0.01,
}  # fmt: skip
_NEOX = {key: value for key, value in LAYER_NORM.items() if key != "num_key_value_heads"} | {
    "layer_norm_eps": 0.01,
    "rope_parameters": HALF_ROPE,
}
_BLOOM = _TOKENS | {"hidden_size": 96, "n_layer": 2, "layer_norm_epsilon": 0.01}
_FALCON = _TOKENS | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 0.01,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
}
_MPT = _TOKENS | {
    "d_model": 96, "n_heads": 6, "n_layers": 2, "max_seq_len": 512, "layer_norm_epsilon": 0.01,
}  # fmt: skip
_OLMO = {key: value for key, value in BASE.items() if key != "rms_norm_eps"}

MODELS: dict[str, Tiny] = {
    "starcoder": Tiny("GPTBigCodeForCausalLM", _GPT, loads_packed=False),
    "starcoder-heads": Tiny(
        "GPTBigCodeForCausalLM", _GPT | {"multi_query": False}, loads_packed=False
    ),
    "gptneox": Tiny("GPTNeoXForCausalLM", _NEOX),
    "gptneox-serial": Tiny(
        "GPTNeoXForCausalLM",
        _NEOX
        | {"use_parallel_residual": False}
        | {"rope_parameters": LINEAR_ROPE | {"partial_rotary_factor": 0.25}},
        beyond=True,
    ),
    "bloom": Tiny("BloomForCausalLM", _BLOOM | {"n_head": 4}),
    "bloom-6": Tiny("BloomForCausalLM", _BLOOM | {"n_head": 6}, beyond=True),
    "falcon-7b": Tiny("FalconForCausalLM", _FALCON | {"multi_query": True}, loads_packed=False),
    "falcon-11b": Tiny(
        "FalconForCausalLM",
        _FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
        | {"tie_word_embeddings": False, "ffn_hidden_size": 160},
        loads_packed=False,
    ),
    "falcon-40b": Tiny(
        "FalconForCausalLM",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        loads_packed=False,
    ),
    "falcon-heads": Tiny("FalconForCausalLM", _FALCON | {"multi_query": False}, loads_packed=False),
    "mpt": Tiny("MptForCausalLM", _MPT, beyond=True),
    "mpt-clipped": Tiny("MptForCausalLM", _MPT | {"attn_config": {"clip_qkv": 1.5}}),
    "olmo": Tiny("OlmoForCausalLM", _OLMO | {"pad_token_id": 0}),
    "olmo-clipped": Tiny("OlmoForCausalLM", _OLMO | {"pad_token_id": 0, "clip_qkv": 1.25}),
}
