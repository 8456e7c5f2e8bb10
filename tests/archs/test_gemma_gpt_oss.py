"""What llama.cpp computes of Gemma 3n, Gemma 4 and gpt-oss, and what it would compute otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.tiny_models import MODELS

from quantcli.archs import find_architecture
from quantcli.archs.rules import Part
from quantcli.errors import ArchitectureError

WINDOWED, FULL = "sliding_attention", "full_attention"


def _config(name: str, **changes: Any) -> dict[str, Any]:
    return {**MODELS[name].config, "architectures": [MODELS[name].model], **changes}


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    found = find_architecture(config).metadata(config).items()
    return {key.partition(".")[2]: value.value for key, value in found}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention to 'all'"),
        ("gemma4", {"layer_types": [FULL] * 4}, "has no sliding_attention"),
        ("gemma4", {"layer_types": [WINDOWED] * 3}, "for each of 4 layers"),
        ("gemma4", {"num_kv_shared_layers": 4}, "num_kv_shared_layers"),
        ("gemma4-small", {"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
        ("gemma4-small", {"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input 100"),
        (
            "gemma4",
            {"per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 64}}},
            "per_layer_config",
        ),
        ("gemma3n", {"laurel_rank": 32}, "laurel_rank to 32"),
        ("gemma3n", {"activation_sparsity_pattern": [0.5] * 3}, "activation_sparsity_pattern"),
        ("gemma3n", {"num_kv_shared_layers": 1}, "num_kv_shared_layers to 1"),
        ("gemma3n", {"final_logit_softcapping": 20.0}, "final_logit_softcapping to 20.0"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit to 5.0"),
        ("gpt-oss", {"attention_bias": False}, "attention_bias to False"),
        ("gpt-oss", {"layer_types": [FULL] * 2}, "sliding_attention among them"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ArchitectureError) as refused:
        _metadata(_config(name, **changes))
    assert words in refused.value.message


def test_no_soft_cap_is_written_as_zero() -> None:
    """Without the key llama.cpp caps logits at 30."""
    assert (
        _metadata(_config("gemma4", final_logit_softcapping=None))["final_logit_softcapping"] == 0
    )


def test_sizes_by_layer_are_published_in_two_ways() -> None:
    named = _config("gemma4")
    layers = {str(i): {"head_dim": 32, "num_key_value_heads": 2} for i in (1, 3)}
    listed = {key: value for key, value in named.items() if "global" not in key}
    assert _metadata(listed | {"per_layer_config": layers}) == _metadata(named)


def test_a_ramp_that_is_not_truncated_is_said() -> None:
    config = _config("gpt-oss-yarn")
    family = find_architecture(config)
    assert family.notes(config, {}) == ()
    rope = {**config["rope_parameters"], "truncate": False}
    (note,) = family.notes({**config, "rope_parameters": rope}, {})
    assert "truncate of yarn" in note


def test_later_layers_have_the_matrices_that_they_read() -> None:
    config = _config(
        "gemma3n", num_hidden_layers=22, num_kv_shared_layers=2,
        layer_types=[*([WINDOWED] * 4 + [FULL]) * 4, WINDOWED, FULL],
        activation_sparsity_pattern=[0.95] * 10 + [0.0] * 12,
    )  # fmt: skip
    sources = find_architecture(config).sources(config)
    assert sources["blk.20.attn_k.weight"] == "model.layers.18.self_attn.k_proj.weight"
    assert sources["blk.21.attn_v.weight"] == "model.layers.19.self_attn.v_proj.weight"


def test_tokens_behind_the_per_layer_table_have_its_first_row() -> None:
    config = _config("gemma3n", vocab_size_per_layer_input=4094)
    rules = find_architecture(config).read_rules(config)
    table = next(rule for rule in rules if rule.name == "per_layer_token_embd.weight")
    dims = {"per_layer_vocab": 3, "per_layer_all": 2}
    stored = np.arange(6).reshape(3, 2)
    parts = [part.order(dims, stored.shape).strided(stored).reshape(-1, 2) for part in table.parts]
    assert isinstance(table.parts[0], Part)
    assert np.concatenate(parts).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [0, 1]]
