"""gpt-oss, with and without a scaled rotation."""

from __future__ import annotations

from support.tiny.base import BASE, EXPERTS, YARN_ROPE, Tiny

GPT_OSS = {
    **BASE,
    **EXPERTS,
    "num_local_experts": 4,
    "head_dim": 32,
    "sliding_window": 16,
}

MODELS: dict[str, Tiny] = {
    "gpt-oss": Tiny("GptOssForCausalLM", GPT_OSS, beyond=True, routed=True),
    "gpt-oss-yarn": Tiny(
        "GptOssForCausalLM",
        GPT_OSS | {"num_hidden_layers": 3, "rope_parameters": YARN_ROPE}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        beyond=True,
        routed=True,
    ),
}  # fmt: skip
