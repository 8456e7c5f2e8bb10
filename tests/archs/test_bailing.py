"""Ling 2.0, whose class is not in transformers: GLM-4.5's function under other names.

Both norm the heads of q and k, rotate a part of each by halves, and choose experts by DeepSeek V3's
router, so transformers' GLM-4.5 with Ling's weights is what llama.cpp is compared with.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import read_config, read_stored, write_model
from support.results import Record, record_error
from support.tiny_models import build

import quantcli
from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")

CONFIG = {"attention_bias": False, "partial_rotary_factor": 0.5}
NAMES = (
    ("model.embed_tokens.", "model.word_embeddings."),
    (".self_attn.o_proj.", ".attention.dense."),
    (".self_attn.q_norm.", ".attention.query_layernorm."),
    (".self_attn.k_norm.", ".attention.key_layernorm."),
    ("gate.e_score_correction_bias", "gate.expert_bias"),
)
RENAMED = {
    "num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts",
    **{key: key for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
        "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace",
        "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "bos_token_id",
        "eos_token_id", "tie_word_embeddings", "num_nextn_predict_layers",
    )},
}  # fmt: skip


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("glm4-moe", tmp_path_factory.mktemp("glm") / "m", changes=CONFIG)


@pytest.fixture(scope="module")
def ling(glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, named and fused as Ling's are."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("ling") / "m"
    shutil.copytree(glm, folder)
    weights = load_file(glm / "model.safetensors")
    # The block for multi-token prediction among them.
    weights = {name: value for name, value in weights.items() if not name.endswith(".bias")}
    weights["model.layers.2.final_layernorm.weight"] = np.ones(64, np.float32)
    for index in range(3):
        inside = f"model.layers.{index}."
        parts = [weights.pop(f"{inside}self_attn.{x}_proj.weight") for x in "qkv"]
        weights[f"{inside}attention.query_key_value.weight"] = np.concatenate(parts)
    for before, after in NAMES:
        weights = {name.replace(before, after): value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = read_config(glm)
    config: dict[str, Any] = {
        "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe_v2",
        "hidden_act": "silu", "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True,
        "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "rope_theta": 3000.0, "rope_scaling": None, "partial_rotary_factor": 0.5,
        "moe_shared_expert_intermediate_size": found["moe_intermediate_size"],
        **{ours: found[theirs] for ours, theirs in RENAMED.items()},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("count", [64, 300])
def test_logits_are_those_of_the_same_weights_in_transformers(
    glm: Path, ling: Path, count: int, tmp_path: Path, record_property: Record
) -> None:
    from support.llama_logits import llama_logits

    tokens = np.random.default_rng(0).integers(2, 4000, count).tolist()
    found = llama_logits(write_model(ling, tmp_path / "m.gguf", dtype="F32"), tokens, context=512)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        glm, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert expected.std() > 1, "flat logits would hide a fault"
    assert record_error(record_property, ling, found, expected) < 1e-3


def test_a_gguf_gives_the_checkpoint_back(ling: Path, tmp_path: Path) -> None:
    file = quantcli.quantize(ling, tmp_path / "m.gguf", type="F32").paths[0]
    folder = quantcli.export(file, tmp_path / "hf", to="hf").paths[0]
    (_, wanted), (_, found) = read_stored(ling), read_stored(folder)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], values) for name, values in wanted.items())
    again = read_config(folder)
    architecture = find_architecture(again)
    assert architecture.metadata(again) == architecture.metadata(read_config(ling))
    assert "model.layers.2.final_layernorm.weight" in found


def test_what_its_graph_does_not_compute_is_refused(ling: Path) -> None:
    config = read_config(ling)
    for key, value in {
        "use_bias": True, "use_qk_norm": False, "score_function": "softmax", "head_dim": 32,
        "moe_shared_expert_intermediate_size": 17,
    }.items():  # fmt: skip
        changed = {**config, key: value}
        with pytest.raises(ArchitectureError, match=r"llama\.cpp|shared expert"):
            find_architecture(changed).metadata(changed)
