"""A GGUF's key-values give back a configuration that gives the same key-values and logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.gguf_models import Stored, materialise, read_config, read_stored
from support.tiny_models import MODELS

from quantcli.archs import find_architecture, rebuild_config
from quantcli.archs.rope import llama3_factors, llama3_rope
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, f32, u32

IDS = [7, 5, 7, *range(300, 341)]


def _rebuild(folder: Path) -> tuple[dict[str, Any], dict[str, MetaValue], dict[str, Any]]:
    config = read_config(folder)
    architecture = find_architecture(config)
    infos, arrays = read_stored(folder)
    tensors = {tensor.name: tensor for tensor in architecture.tensors(config, infos)}
    metadata = architecture.metadata(config, Stored(infos, arrays))
    # As it comes out of a file: float32.
    stored = {
        key: MetaValue("f32", float(np.float32(value.value))) if value.kind == "f32" else value
        for key, value in metadata.items()
    }

    def read(name: str) -> NDArray[np.float32]:
        return materialise(tensors[name], arrays)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return config, metadata, rebuild_config(architecture.name, stored, shapes, read)


TEXT_ONLY = ("qwen2-vl", "qwen3-vl", "qwen3-vl-moe")
"""Models that come back as the text models that they compute."""


@pytest.mark.parametrize("name", MODELS)
def test_the_rebuilt_configuration_gives_the_same_key_values(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    _, metadata, rebuilt = _rebuild(checkpoint(name))
    architecture = find_architecture(rebuilt)
    stored = Stored(*read_stored(checkpoint(name))) if architecture.keyed else None
    again = architecture.metadata(rebuilt, stored)
    if name in TEXT_ONLY:
        metadata = {
            re.sub(r"^qwen(\d)vl", r"qwen\1", key): value
            for key, value in metadata.items()
            if not key.endswith(("dimension_sections", "n_deepstack_layers"))
        }
    assert again.keys() == metadata.keys()
    for key, value in metadata.items():
        if value.kind == "f32":
            assert np.float32(again[key].value) == np.float32(value.value), key
        else:
            assert again[key] == value, key


@pytest.mark.parametrize("name", MODELS)
def test_the_rebuilt_configuration_gives_the_same_logits(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    torch = pytest.importorskip("torch")
    from quantcli.layerwise.layerwise_model import LayerwiseModel
    from quantcli.model import open_model

    config, _, rebuilt = _rebuild(checkpoint(name))

    def logits(settings: Mapping[str, Any]) -> Any:
        with open_model(checkpoint(name), vocabulary=False) as model:
            # The image-and-text class has its text model's weights under another name.
            layers = LayerwiseModel(model, settings)
            with layers.start() as start:
                hidden, calls = start.embed(IDS), start.calls(IDS)
            for index, call in enumerate(calls):
                with layers.filled(layers.layer_parameters(index)):
                    hidden = layers.run(index, hidden, call)
            with layers.filled([*layers.outside_layers(), layers.head_name]):
                return layers.logits(layers.finish(hidden))

    wanted, found = logits(config), logits(rebuilt)
    # Divisors of Llama 3's scaling are found again to a few units of float32.
    bound = 1e-3 if name == "llama-llama3" else 1e-5
    assert torch.isfinite(found).all()
    assert (found - wanted).abs().max() <= bound * wanted.std()


LLAMA3 = [
    (8.0, 1.0, 4.0, 8192, 500000.0, 128),
    (32.0, 1.0, 4.0, 8192, 500000.0, 64),
    (8.0, 1.0, 4.0, 64, 3000.0, 32),
    (16.0, 1.0, 1.5, 4096, 10000.0, 64),
    (4.0, 2.0, 2.5, 1024, 100000.0, 32),
]


@pytest.mark.parametrize("case", LLAMA3, ids=str)
def test_llama3_divisors_are_found_again(case: tuple[Any, ...]) -> None:
    factor, low, high, original, theta, head_dim = case
    rope = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
        "rope_theta": theta,
        "architectures": ["LlamaForCausalLM"],
    }
    divisors = llama3_factors(rope, head_dim)
    assert len(set(divisors.tolist())) > 1
    found = llama3_rope(divisors.astype(np.float64), theta)
    again = llama3_factors({**found, "architectures": ["LlamaForCausalLM"]}, head_dim)
    np.testing.assert_allclose(again, divisors, rtol=1e-5)


def test_other_divisors_are_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"rope_freqs\.weight does not hold"):
        llama3_rope(np.array([1.0, 3.0, 2.0, 8.0, 1.0, 4.0]), 10000.0)


def _llama() -> tuple[dict[str, MetaValue], dict[str, tuple[int, ...]]]:
    keys: dict[str, MetaValue] = {
        "embedding_length": u32(64), "block_count": u32(1), "feed_forward_length": u32(96),
        "context_length": u32(128), "attention.head_count": u32(4),
        "attention.layer_norm_rms_epsilon": f32(1e-5),
    }  # fmt: skip
    return {f"llama.{key}": value for key, value in keys.items()}, {"token_embd.weight": (50, 64)}


def test_keys_that_a_file_leaves_out_are_derived() -> None:
    keys, shapes = _llama()
    config = rebuild_config("llama", keys, shapes, lambda name: np.zeros(0, np.float32))
    assert config["vocab_size"] == 50
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["rms_norm_eps"] == 1e-5


REFUSED = {
    "an architecture without a table": ("rwkv6", {}, "of a rwkv6 model cannot be told"),
    "no embedding": ("llama", {"shapes": {}}, r"no tensor token_embd\.weight"),
    "values of another size": (
        "llama",
        {"keys": {"llama.attention.value_length": u32(8)}},
        r"sets llama\.attention\.value_length to 8, but quantcli knows llama models .* 16 only",
    ),
    "no layers": (
        "llama",
        {"without": "llama.block_count"},
        "config.json has no num_hidden_layers",
    ),
    "heads that differ by layer": (
        "llama",
        {"keys": {"llama.attention.head_count": MetaValue("[u32]", [4, 2])}},
        "num_attention_heads",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_in_the_tables_is_refused(case: tuple[str, dict[str, Any], str]) -> None:
    arch, change, message = case
    keys, shapes = _llama()
    keys |= change.get("keys", {})
    keys.pop(change.get("without", ""), None)
    with pytest.raises(ArchitectureError, match=message):
        rebuild_config(
            arch, keys, change.get("shapes", shapes), lambda name: np.zeros(0, np.float32)
        )
