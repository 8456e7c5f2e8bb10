"""A model in a dozen numbers, from either kind of description."""

from __future__ import annotations

import json

import pytest

from quantcli.archs import find_architecture
from quantcli.report.facts import facts_of_config, facts_of_metadata, number_words
from quantcli.types import array, text, u32

SIZES = ("layers", "hidden", "feed_forward", "heads", "kv_heads", "head_dim", "context")

CONFIGS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 80, "hidden_size": 8192,
        "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "n_layer": 12, "n_embd": 768, "n_inner": 3072,
        "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_both_descriptions_agree(name):
    config = CONFIGS[name]
    architecture = find_architecture(config)
    keys = {"general.architecture": text(architecture.name), **architecture.metadata(config)}
    checked, taken = facts_of_metadata(keys, config), facts_of_config(config)
    assert checked.architecture == architecture.name
    assert taken.architecture is None
    assert checked.model_class == taken.model_class == config["architectures"][0]
    for field in (*SIZES, "vocabulary"):
        assert getattr(checked, field) == getattr(taken, field), field
    assert taken.head_dim == {"llama": 128, "gpt2": 64}[name]
    assert taken.kv_heads == {"llama": 8, "gpt2": 12}[name]


def test_the_text_part_of_a_model_of_several_counts():
    found = facts_of_config({"text_config": {"hidden_size": 2048}, "hidden_size": 5})
    assert found.hidden == 2048


@pytest.mark.parametrize("value", [None, True, "many", {"a": 1}, [1, "x"], [], 1.5, [True]])
def test_what_is_no_number_is_not_told(value):
    assert facts_of_config({"num_hidden_layers": value}).layers is None


def test_numbers_may_differ_from_layer_to_layer():
    keys = {
        "general.architecture": text("x"),
        "x.attention.head_count": array("u32", [8, 16, 8]),
        "x.attention.head_count_kv": array("u32", [4, 4, 4]),
        "x.block_count": u32(3),
    }
    found = facts_of_metadata(keys)
    assert (found.heads, found.kv_heads) == ((8, 16, 8), 4)
    assert number_words(found.heads) == "8 to 16"
    assert number_words(found.layers) == "3"
    assert number_words(None) == "?"
    assert number_words(128256) == "128,256"


def test_the_vocabulary_of_a_gguf_is_counted_where_no_key_tells_it():
    keys = {"general.architecture": text("x"), "tokenizer.ggml.tokens": array("str", ["a", "b"])}
    assert facts_of_metadata(keys).vocabulary == 2


def test_nothing_is_known_of_an_empty_description():
    assert json.dumps(facts_of_config({}).layers) == "null"
    assert facts_of_metadata({}).architecture is None
