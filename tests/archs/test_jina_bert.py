"""Jina's second embedders, whose class comes with the checkpoints alone, against their formulas."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import read_config, read_stored, write_model
from support.results import Record, record_error
from support.tiny.base import VOCAB
from support.tiny_models import TOKENIZER, draw

import quantcli
from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError

torch = pytest.importorskip("torch")
pytest.importorskip("llama_cpp")

HEADS, HIDDEN, HEIGHT, LAYERS = 6, 96, 128, 2
CONFIG: dict[str, Any] = {
    "architectures": ["JinaBertModel"], "model_type": "bert", "vocab_size": VOCAB,
    "hidden_size": HIDDEN, "intermediate_size": HEIGHT, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 8192, "type_vocab_size": 2,
    "layer_norm_eps": 0.01, "position_embedding_type": "alibi", "feed_forward_type": "geglu",
    "hidden_act": "gelu", "pad_token_id": 0,
}  # fmt: skip
EPSILON = CONFIG["layer_norm_eps"]


def _shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCAB, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
    }
    for i in range(LAYERS):
        block = f"encoder.layer.{i}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value",
                     "attention.output.dense"):  # fmt: skip
            found |= {f"{block}{name}.weight": (HIDDEN, HIDDEN), f"{block}{name}.bias": (HIDDEN,)}
        for name in ("attention.output.LayerNorm", "mlp.layernorm"):
            found |= {f"{block}{name}.weight": (HIDDEN,), f"{block}{name}.bias": (HIDDEN,)}
        found[f"{block}mlp.gated_layers.weight"] = (2 * HEIGHT, HIDDEN)
        found |= {f"{block}mlp.wo.weight": (HIDDEN, HEIGHT), f"{block}mlp.wo.bias": (HIDDEN,)}
    return found


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: draw(name, torch.ones(shape), generator).contiguous()
        for name, shape in _shapes().items()
    }


@pytest.fixture(scope="module")
def folder(weights: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("jina") / "m"
    path.mkdir()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, path / file)
    return path


def _slopes() -> Any:
    """ALiBi's, of the power of two below the heads and, for the rest, of the one above."""
    below = 2 ** int(math.log2(HEADS))
    first = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    more = [2 ** (-4 * (2 * i + 1) / below) for i in range(HEADS - below)]
    return torch.tensor(first + more)


def _gelu(x: Any) -> Any:
    """ggml's table."""
    return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def _embeddings(weights: dict[str, Any], tokens: list[int]) -> Any:
    def norm(x: Any, name: str) -> Any:
        pair = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, (HIDDEN,), *pair, EPSILON)

    def linear(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def heads(x: Any) -> Any:
        return x.reshape(len(tokens), HEADS, -1).transpose(0, 1)

    places = torch.arange(len(tokens))
    bias = -_slopes()[:, None, None] * (places[:, None] - places[None]).abs()
    hidden = weights["embeddings.word_embeddings.weight"][tokens]
    hidden = hidden + weights["embeddings.token_type_embeddings.weight"][0]
    hidden = norm(hidden, "embeddings.LayerNorm")
    for i in range(LAYERS):
        block = f"encoder.layer.{i}."
        q, k, v = (
            heads(linear(hidden, f"{block}attention.self.{name}"))
            for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(HIDDEN // HEADS) + bias
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(tokens), HIDDEN)
        mixed = linear(mixed, f"{block}attention.output.dense")
        hidden = norm(hidden + mixed, f"{block}attention.output.LayerNorm")
        gate, up = (hidden @ weights[f"{block}mlp.gated_layers.weight"].T).split(HEIGHT, -1)
        down = linear(_gelu(gate) * up, f"{block}mlp.wo")
        hidden = norm(hidden + down, f"{block}mlp.layernorm")
    return hidden.numpy()


@pytest.mark.parametrize("count", [40, 300])
def test_embeddings_are_those_of_the_formulas(
    weights: dict[str, Any], folder: Path, count: int, tmp_path: Path, record_property: Record
) -> None:
    from support.llama_embeddings import llama_embeddings

    tokens = np.random.default_rng(0).integers(3, 4000, count).tolist()
    found = llama_embeddings(write_model(folder, tmp_path / "m.gguf", dtype="F32"), tokens)
    expected = _embeddings(weights, tokens)
    assert expected.std() > 0.1, "flat embeddings would hide a fault"
    assert record_error(record_property, folder, found, expected) < 4e-3


def test_a_gguf_gives_the_checkpoint_back(folder: Path, tmp_path: Path) -> None:
    file = quantcli.quantize(folder, tmp_path / "m.gguf", type="F32").paths[0]
    again = quantcli.export(file, tmp_path / "hf", to="hf").paths[0]
    (_, wanted), (_, found) = read_stored(folder), read_stored(again)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], values) for key, values in wanted.items())
    rebuilt = read_config(again)
    metadata = find_architecture(CONFIG).metadata(CONFIG)
    assert find_architecture(rebuilt).metadata(rebuilt).keys() == metadata.keys()
    assert rebuilt["position_embedding_type"] == "alibi"


@pytest.mark.parametrize(
    ("key", "value"), [("feed_forward_type", "reglu"), ("position_embedding_type", "absolute")]
)
def test_other_kinds_are_refused(key: str, value: str) -> None:
    with pytest.raises(ArchitectureError, match=f"sets {key} to '{value}'"):
        find_architecture(CONFIG).metadata({**CONFIG, key: value})
