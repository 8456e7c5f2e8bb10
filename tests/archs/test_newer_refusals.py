"""What llama.cpp's graphs of the newer families do not compute is refused by a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import read_config

from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError

_BASES = {"full_attention": {"rope_theta": 3000.0}, "sliding_attention": {"rope_theta": 300.0}}
_FULL = ["full_attention"] * 2

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("ministral3", {"attention_bias": True}, "sets attention_bias to True"),
    ("llama4", {"attention_chunk_size": 4096}, "sets attention_chunk_size to 4096"),
    ("llama4", {"attn_temperature_tuning": False}, "sets attn_temperature_tuning to False"),
    ("llama4", {"moe_layers": [0]}, r"has experts in the layers \[0\]"),
    ("llama4", {"moe_layers": 3}, "expected a list of values of type int"),
    ("llama4", {"use_qk_norm": False}, "sets use_qk_norm to False with 4 experts"),
    ("llama4", {"no_rope_layers": [0, 1, 1, 1]}, "leaves every 4th layer unrotated"),
    ("llama4", {"layer_types": ["full_attention"] * 4}, "lets every 4th layer attend"),
    ("hunyuan-dense", {"use_cla": True}, "sets use_cla to True"),
    ("hunyuan-moe", {"num_shared_expert": [2, 2]}, "sets num_shared_expert to 2"),
    ("hunyuan-moe", {"moe_topk": [1, 2]}, "moe_topk .* differs by layer"),
    ("cohere2-moe", {"mlp_layer_types": ["sparse", "dense"]}, "dense layers before all layers"),
    ("cohere2-moe", {"mlp_layer_types": _FULL}, "dense layers before all layers"),
    ("cohere2-moe", {"layer_types": _FULL}, "gives no layer a sliding window"),
    ("cohere2-moe", {"shared_expert_combination_strategy": "sum"}, "'average' only"),
    ("apertus", {"hidden_act": "silu"}, "sets hidden_act to 'silu'"),
    ("apertus", {"tie_word_embeddings": True}, "sets tie_word_embeddings to True"),
    ("mellum", {"rope_parameters": _BASES}, "llama.cpp has one for all layers"),
    ("mellum", {"rope_parameters": {"full_attention": 3}}, "holds 3 for full_attention"),
    ("mellum", {"mlp_layer_types": ["dense", "sparse"]}, "has dense layers"),
    ("laguna", {"gating": False}, "gating .* is False, expected true"),
    ("laguna", {"num_attention_heads_per_layer": [4, 6, 5]}, "key-value heads do not divide"),
    ("laguna", {"num_attention_heads_per_layer": [4]}, "a count for each of 3 layers"),
    ("laguna", {"moe_router_logit_softcapping": 30.0}, "sets moe_router_logit_softcapping"),
    ("afmoe", {"mup_enabled": False}, "sets mup_enabled to False"),
    ("afmoe", {"layer_types": ["full_attention"] * 5}, "all layers but each 4th"),
    ("mimo2", {"swa_head_dim": 8}, "sets swa_head_dim to 8"),
    ("mimo2", {"layer_types": _FULL}, "gives no layer a sliding window"),
    ("granite-swa", {"layer_rope_theta": [300.0, 0, 3000.0]}, "has 2 bases"),
    ("glm4v", {"text_config": {"rope_parameters": {"mrope_section": [1]}}}, "expected parts of"),
]


@pytest.mark.parametrize(("name", "patch", "sentence"), CASES, ids=str)
def test_a_sentence_names_the_key(
    name: str, patch: dict[str, Any], sentence: str, checkpoint: Callable[..., Path]
) -> None:
    config = read_config(checkpoint(name))
    assert find_architecture(config).metadata(config)
    if "text_config" in patch:
        patch = {"text_config": {**config["text_config"], **patch["text_config"]}}  # type: ignore[dict-item]
    with pytest.raises(ArchitectureError, match=sentence):
        find_architecture(config).metadata({**config, **patch})


def test_a_dynamic_rotation_is_remarked(checkpoint: Callable[..., Path]) -> None:
    config = read_config(checkpoint("llama-dynamic"))
    (note,) = find_architecture(config).notes(config)
    assert "beyond 512 tokens (rope type 'dynamic')" in note
    plain = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}}
    architecture = find_architecture(config)
    assert architecture.metadata(config) == architecture.metadata(plain)
    assert not architecture.notes(plain)
