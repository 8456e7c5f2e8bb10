"""Families whose class comes with the checkpoints alone, and computes what another class does.

The weights are those of a tiny model of transformers' class, the config.json is the family's; so
transformers' class is what llama.cpp is compared with.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import read_config, read_stored, write_model
from support.results import Record, record_error
from support.tiny.base import LONG_ROPE
from support.tiny_models import build

import quantcli
from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Relative:
    """A tiny model of transformers', and what the family's config.json says of it."""

    tiny: str
    config: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    store: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """The family's tensors out of transformers'."""


_INTERNLM2 = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def _internlm2(tensors: dict[str, Any]) -> dict[str, Any]:
    """q, k and v in one matrix, by key-value heads of 16 values."""
    found = {}
    for name, value in tensors.items():
        if name.endswith("q_proj.weight"):
            block = name.removesuffix("self_attn.q_proj.weight")
            q, k, v = (
                tensors[f"{block}self_attn.{x}_proj.weight"].reshape(2, -1, 16, 64) for x in "qkv"
            )
            fused = torch.cat((q, k, v), dim=1).reshape(-1, 64).contiguous()
            found[f"{block}attention.wqkv.weight"] = fused
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            for ours, theirs in _INTERNLM2.items():
                name = name.replace(ours, theirs)
            found[name] = value
    return found


_LONG = {key: value for key, value in LONG_ROPE.items() if key != "partial_rotary_factor"} | {
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
}
_SCALES = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 1.4 / math.sqrt(2),
    "attention_multiplier": 0.25,
    "logits_scaling": 0.5,
}
_MINICPM = {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 128, "rope_theta": 3000.0}

RELATIVES = {
    "InternLM2ForCausalLM": Relative(
        "llama-tied",
        {
            "model_type": "internlm2", "bias": False, "rope_theta": 3000.0,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        {"tie_word_embeddings": False},
        _internlm2,
    ),
    "InternLM3ForCausalLM": Relative(
        "llama-tied",
        {
            "model_type": "internlm3", "qkv_bias": False, "bias": False, "head_dim": 16,
            "rope_theta": 3000.0,
            "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        },
    ),
    "XverseForCausalLM": Relative(
        "llama-tied",
        {"model_type": "xverse", "rope_theta": 3000.0},
        {"tie_word_embeddings": False},
    ),
    "MiniCPMForCausalLM": Relative("granite", {"model_type": "minicpm", **_MINICPM}, _SCALES),
    "MiniCPMForCausalLM with LongRoPE": Relative(
        "granite",
        {"model_type": "minicpm", **_MINICPM, "rope_scaling": _LONG},
        {**_SCALES, "rope_parameters": _LONG, "max_position_embeddings": 1024},
    ),
    "OrionForCausalLM": Relative(
        "stablelm",
        {"model_type": "orion", "rope_theta": 3000.0, "rms_norm_eps": 0.01},
        {
            "use_qkv_bias": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 1.0,
            },
        },
    ),
}  # fmt: skip


@pytest.fixture(params=RELATIVES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def ours(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' own folder."""
    relative = RELATIVES[name]
    folder = tmp_path_factory.mktemp("relative") / "m"
    return build(relative.tiny, folder, changes=relative.changes)


@pytest.fixture(scope="module")
def theirs(name: str, ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with the family's config.json."""
    folder = tmp_path_factory.mktemp("relative") / "m"
    shutil.copytree(ours, folder)
    found = read_config(ours)
    config = {key: found[key] for key in _SHARED if key in found}
    config |= {"architectures": [name.split()[0]], "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config | RELATIVES[name].config))
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    save_file(RELATIVES[name].store(load_file(weights)), weights, {"format": "pt"})
    return folder


@pytest.mark.parametrize("count", [64, 300])
def test_logits_are_those_of_the_same_weights_in_transformers(
    ours: Path, theirs: Path, count: int, tmp_path: Path, record_property: Record
) -> None:
    from support.llama_logits import llama_logits

    tokens = np.random.default_rng(0).integers(2, 4000, count).tolist()
    # llama.cpp takes the list of a context's length for a whole run, transformers that of a text's.
    context = 256 if count < 256 else 512
    file = write_model(theirs, tmp_path / "m.gguf", dtype="F32")
    found = llama_logits(file, tokens, context=context)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        ours, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert expected.std() > 1, "flat logits would hide a fault"
    assert record_error(record_property, theirs, found, expected) < 1e-3


def test_a_gguf_gives_the_checkpoint_back(name: str, theirs: Path, tmp_path: Path) -> None:
    file = quantcli.quantize(theirs, tmp_path / "m.gguf", type="F32").paths[0]
    folder = quantcli.export(file, tmp_path / "hf", to="hf").paths[0]
    (_, wanted), (_, found) = read_stored(theirs), read_stored(folder)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], values) for key, values in wanted.items())
    again = read_config(folder)
    expected = find_architecture(read_config(theirs)).metadata(read_config(theirs))
    metadata = find_architecture(again).metadata(again)
    assert metadata.keys() == expected.keys()
    for key, value in expected.items():
        if value.kind == "f32":
            assert np.float32(metadata[key].value) == np.float32(value.value), key
        else:
            assert metadata[key] == value, key


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("InternLM2ForCausalLM", {"bias": True}),
        ("InternLM3ForCausalLM", {"qkv_bias": True}),
        ("XverseForCausalLM", {"tie_word_embeddings": True}),
        ("MiniCPMForCausalLM", {"num_experts": 8}),
        ("OrionForCausalLM", {"attention_bias": True}),
    ],
)
def test_what_its_graph_does_not_compute_is_refused(model: str, change: dict[str, Any]) -> None:
    config = {
        "architectures": [model], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    assert find_architecture(config).metadata(config)
    with pytest.raises(ArchitectureError, match=next(iter(change))):
        find_architecture(config).metadata({**config, **change})
