"""DeciLM: logits of llama.cpp against layers of transformers' Llama, put together one by one."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import read_config, read_stored, write_model
from support.results import Record, record_error
from support.tiny.base import LLAMA3_ROPE, VOCAB
from support.tiny_models import TOKENIZER, draw

import quantcli
from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")


def _block(group: int | None, mult: float | None, linear: bool = False) -> dict[str, Any]:
    attention = {"n_heads_in_group": group, "no_op": group is None, "replace_with_linear": linear}
    return {
        "attention": attention,
        "ffn": {"ffn_mult": mult, "no_op": mult is None, "replace_with_linear": False},
    }


CONFIG: dict[str, Any] = {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "intermediate_size": None,
    "num_key_value_heads": None,
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.01,
    "rope_theta": 3000.0,
    "rope_scaling": {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    # A matrix, nothing, and an empty layer among those with attention.
    "block_configs": [
        _block(2, 6.0), _block(None, 12.0, linear=True), _block(None, 5.5), _block(None, None),
        _block(1, 3.25),
    ],
}  # fmt: skip
HEIGHTS = (256, 512, 256, 0, 256)


class _Matrix(torch.nn.Module):
    """What stands in place of an attention."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear_attn = torch.nn.Linear(size, size, bias=False)

    def forward(self, hidden_states: Any, **kwargs: Any) -> tuple[Any, None]:
        return self.linear_attn(hidden_states), None


class _Layer(torch.nn.Module):
    """A layer of Llama of which parts may be missing."""

    def __init__(self, base: Any, block: dict[str, Any], height: int, index: int) -> None:
        super().__init__()
        from transformers.models.llama import modeling_llama as llama

        config = copy.deepcopy(base)
        group = block["attention"]["n_heads_in_group"]
        config.num_key_value_heads = config.num_attention_heads // (group or 1)
        config.intermediate_size = height
        norm = (config.hidden_size, config.rms_norm_eps)
        if group or block["attention"]["replace_with_linear"]:
            self.input_layernorm = llama.LlamaRMSNorm(*norm)
            self.self_attn = (
                llama.LlamaAttention(config, index) if group else _Matrix(config.hidden_size)
            )
        if height:
            self.post_attention_layernorm = llama.LlamaRMSNorm(*norm)
            self.mlp = llama.LlamaMLP(config)

    def forward(self, hidden: Any, **kwargs: Any) -> Any:
        if hasattr(self, "self_attn"):
            normed = self.input_layernorm(hidden)
            hidden = hidden + self.self_attn(hidden_states=normed, **kwargs)[0]
        if hasattr(self, "mlp"):
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        **{key: CONFIG[key] for key in ("vocab_size", "hidden_size", "num_attention_heads",
                                        "num_hidden_layers", "max_position_embeddings",
                                        "rms_norm_eps")},
        intermediate_size=96, rope_parameters=LLAMA3_ROPE, attn_implementation="eager",
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config)
    layers = zip(CONFIG["block_configs"], HEIGHTS, strict=True)
    made.model.layers = torch.nn.ModuleList(
        _Layer(config, block, height, index) for index, (block, height) in enumerate(layers)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for label, weight in made.named_parameters():
            weight.copy_(draw(label, weight, generator))
    return made.eval()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("deci") / "m"
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, path / file)
    return path


@pytest.mark.parametrize("count", [64, 300])
def test_logits_are_those_of_the_layers(
    model: Any, folder: Path, count: int, tmp_path: Path, record_property: Record
) -> None:
    from support.llama_logits import llama_logits

    tokens = np.random.default_rng(0).integers(2, 4000, count).tolist()
    file = write_model(folder, tmp_path / "m.gguf", dtype="F32")
    found = llama_logits(file, tokens, context=512)
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    assert expected.std() > 1, "flat logits would hide a fault"
    assert record_error(record_property, folder, found, expected) < 1e-3


def test_a_gguf_gives_the_checkpoint_back(folder: Path, tmp_path: Path) -> None:
    file = quantcli.quantize(folder, tmp_path / "m.gguf", type="F32").paths[0]
    again = quantcli.export(file, tmp_path / "hf", to="hf").paths[0]
    (_, wanted), (_, found) = read_stored(folder), read_stored(again)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], values) for key, values in wanted.items())
    config = read_config(again)
    metadata = find_architecture(CONFIG).metadata(CONFIG)
    rebuilt = find_architecture(config).metadata(config)
    assert rebuilt.keys() == metadata.keys()
    for key in ("head_count", "head_count_kv"):
        assert rebuilt[f"deci.attention.{key}"] == metadata[f"deci.attention.{key}"]
    assert list(rebuilt["deci.feed_forward_length"].value) == list(HEIGHTS)


def test_every_type_of_layer_is_quantized(folder: Path, tmp_path: Path) -> None:
    from support.llama_logits import llama_logits

    tokens = np.random.default_rng(0).integers(2, 4000, 64).tolist()
    full = llama_logits(write_model(folder, tmp_path / "f.gguf", dtype="F32"), tokens)
    small = quantcli.quantize(folder, tmp_path / "q.gguf", type="Q8_0").paths[0]
    assert np.corrcoef(llama_logits(small, tokens).ravel(), full.ravel())[0, 1] > 0.99


def test_counts_of_the_first_decilm() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "block_configs"} | {
        "num_key_value_heads_per_layer": [4, 2, 1, 1, 4],
        "intermediate_size": 96,
    }
    metadata = find_architecture(config).metadata(config)
    assert list(metadata["deci.attention.head_count_kv"].value) == [4, 2, 1, 1, 4]
    assert list(metadata["deci.attention.head_count"].value) == [4] * 5
    assert list(metadata["deci.feed_forward_length"].value) == [96] * 5


def test_heads_that_do_not_divide_are_refused() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "block_configs"} | {
        "num_key_value_heads_per_layer": [4, 3, 1, 1, 4],
        "intermediate_size": 96,
    }
    with pytest.raises(ArchitectureError, match=r"layer 1 .* 4 heads over 3 key-value heads"):
        find_architecture(config).metadata(config)


REFUSED: dict[str, tuple[Any, str]] = {
    "attention without an MLP": ([_block(2, 6.0), _block(2, None)], "has attention and no MLP"),
    "a first layer without": ([_block(None, 6.0), _block(2, 6.0)], "first layer .* no attention"),
    "a window": (
        [{**_block(2, 6.0), "attention": {"n_heads_in_group": 2, "window_length": 8}}] * 2,
        "window_length to 8",
    ),
    "a linear MLP": (
        [{**_block(2, 6.0), "ffn": {"ffn_mult": None, "replace_with_linear": True}}] * 2,
        "replace_with_linear for an MLP",
    ),
    "heads that do not fit": ([_block(3, 6.0)] * 2, "puts 3 heads into a group"),
    "too few": ([_block(2, 6.0)], "with an entry for each of 2 layers"),
    "no object": ([_block(2, 6.0), 7], "has the entry 7"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_its_graph_does_not_compute_is_refused(case: tuple[Any, str]) -> None:
    blocks, message = case
    config = {**CONFIG, "num_hidden_layers": 2, "block_configs": blocks}
    with pytest.raises(ArchitectureError, match=message):
        find_architecture(config).metadata(config)
