"""What the configurations of tiny models have in common.

Epsilons and rotation bases are unusual and large, so that a default taken in their place shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 4096
"""Tokens of the vocabulary of tests/data/bookworm-mini."""

BASE: dict[str, Any] = {
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
LAYER_NORM = {key: value for key, value in BASE.items() if key != "rms_norm_eps"}
HALF_ROPE = {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 0.5}
MROPE = {"rope_type": "default", "rope_theta": 3000.0, "mrope_section": [3, 3, 2]}
GEMMA = {
    **BASE,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    **GEMMA,
    "num_hidden_layers": 6,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 30000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
    },
}
EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 3000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 3000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 2.0}
LONG_ROPE = {
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
    beside: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensors of the checkpoint that transformers leaves out, such as a block behind the layers."""
    beyond: bool = False
    """Whether its attention changes beyond some length: scaled rotations, sliding windows."""
    routed: bool = False
    """Whether a router chooses, which rounding may send to another expert near a tie."""
    absorbed: bool = False
    """Whether llama.cpp multiplies matrices in another order, and so rounds other operands."""
    transposed: bool = False
    """Whether its matrices are stored as (in, out), which no packed folder does."""
    turned: bool = False
    """Whether experts are written as publishers do, transposed, though transformers does not."""
    loads_packed: bool = True
    """Whether transformers' class takes packed weights."""
    folded: bool = False
    """Whether multipliers of its configuration become part of the weights in GGUF."""
    chunks: int = 12
    """Windows to calibrate on; fewer where transformers takes one token after the other."""
