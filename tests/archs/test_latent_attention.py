"""Latent attention where its matrices are split: methods, folders, refusals and notes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import read_config
from support.tiny.base import YARN_ROPE

import quantcli
from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HEADS, NOPE, VALUE = 4, 32, 24
EXPANSION = "model.layers.1.self_attn.kv_b_proj.weight"


def _expansion(folder: Path) -> Any:
    """Rows of the expansion by head, keys' before values'."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.state_dict()[EXPANSION].reshape(HEADS, NOPE + VALUE, -1).numpy()


def test_a_method_in_a_folder_rounds_values_and_leaves_keys_to_the_nearest(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A method works on GGUF's tensors, whose blocks lie across the keys' stored rows."""
    pytest.importorskip("compressed_tensors")
    options: dict[str, Any] = {"to": "compressed-tensors", "bits": 4, "group_size": 32}
    source = checkpoint("deepseek-v2")
    found = []
    for name, more in (("nearest", {}), ("gptq", {"method": "gptq", "calibrate": [], "chunks": 4})):
        packed = quantcli.quantize(source, tmp_path / name, **options, **more).paths[0]
        decoded = quantcli.quantize(packed, tmp_path / f"{name}-hf", to="hf", type="F32").paths[0]
        found.append(_expansion(decoded))
    nearest, rounded = found
    np.testing.assert_array_equal(rounded[:, :NOPE], nearest[:, :NOPE])
    assert (rounded[:, NOPE:] != nearest[:, NOPE:]).mean() > 0.05


def test_a_gguf_of_integers_leaves_the_expansion_in_floats(
    gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """Its blocks lie across the rows of the checkpoint, so they cannot be put back as they are."""
    folder = quantcli.export(
        gguf("deepseek-v2", "Q8_0"), tmp_path / "w8", to="compressed-tensors"
    ).paths[0]
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert EXPANSION.removesuffix(".weight") in settings["ignore"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(5, 37)[None]).logits).all()


def test_kimi_k2_is_built_from_the_class_that_it_names(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its model_type comes with code of its own, which transformers does not have."""
    folder = tmp_path / "kimi"
    shutil.copytree(checkpoint("deepseek-v3"), folder)
    config = read_config(folder) | {"model_type": "kimi_k2"}
    (folder / "config.json").write_text(json.dumps(config))
    done = quantcli.quantize(
        folder, tmp_path / "m.gguf", type="Q4_0", method="gptq", calibrate=[], chunks=2
    )
    rounded = {tensor["tensor"] for tensor in done.document["tensors"]}
    assert {"blk.1.attn_k_b.weight", "blk.1.attn_v_b.weight"} <= rounded


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": YARN_ROPE}, "mscale_all_dim at 0"),
        ({"rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "by 1.0"),
        ({"rope_parameters": YARN_ROPE | {"mscale": 1, "mscale_all_dim": 1, "truncate": False}},
         "truncate of yarn to false"),
        ({"num_hidden_layers": 27}, "takes a model of 27 layers"),
        ({"num_key_value_heads": 2}, "2 key-value heads for 4"),
        ({"qk_rope_head_dim": 15}, "expected an even number"),
        ({"rope_interleave": False}, "rope_interleave to False"),
        ({"scoring_func": "softmax"}, "scoring_func to 'softmax'"),
        ({"n_group": 3, "topk_group": 1}, "from 1 of 3 groups of 8"),
        ({"n_group": 4, "topk_group": 1}, "chooses 3 experts from 1 of 4 groups"),
        ({"mlp_layer_types": ["dense", "sparse", "dense"]}, "a dense layer after one with experts"),
        ({"mlp_layer_types": ["dense"]}, "for each of 3 layers"),
    ],
)  # fmt: skip
def test_what_its_graph_does_not_compute_is_refused(
    checkpoint: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    config = read_config(checkpoint("deepseek-v3")) | changes
    with pytest.raises(ArchitectureError, match=said):
        find_architecture(config).metadata(config)


def test_notes_on_what_llama_cpp_computes_otherwise(checkpoint: Callable[..., Path]) -> None:
    config = read_config(checkpoint("deepseek-v3"))
    assert find_architecture(config).notes(config) == ()
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    config |= {"rope_parameters": rope | {"beta_fast": 1.0}, "rms_norm_eps": 1e-5}
    beta, epsilon = find_architecture(config).notes(config)
    assert beta.endswith("run it with --yarn-beta-fast 1")
    assert "an epsilon of 1e-06, llama.cpp with rms_norm_eps, which is 1e-05" in epsilon
    older = read_config(checkpoint("deepseek-v2"))
    grouped = older | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    (note,) = find_architecture(grouped).notes(grouped)
    assert "llama.cpp by the sum of the two best" in note
