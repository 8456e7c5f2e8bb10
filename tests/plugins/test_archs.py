"""A family from another distribution."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from support.plugin import Quantcli

pytestmark = pytest.mark.slow

_PARTS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "model.layers.": "layers.",
}


def rename(mini: Path, folder: Path) -> Path:
    """The small model as Meta would have stored it."""
    import ml_dtypes  # noqa: F401
    from safetensors.numpy import load_file, save_file

    shutil.copytree(mini, folder)
    config = json.loads((mini / "config.json").read_text())
    config["architectures"] = ["MetaLlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    stored = {}
    for name, values in load_file(mini / "model.safetensors").items():
        for ours, theirs in _PARTS.items():
            name = name.replace(ours, theirs)
        if ".wq." in name or ".wk." in name:
            heads = len(values) // (config["hidden_size"] // config["num_attention_heads"])
            halves = values.reshape(heads, 2, -1, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        stored[name] = values
    save_file(stored, folder / "model.safetensors")
    return folder


def test_a_family_under_other_names(quantcli: Quantcli, mini: Path, tmp_path: Path) -> None:
    folder = rename(mini, tmp_path / "model")
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    quantcli("quantize", mini, "--bits", "4", "-o", ours)
    quantcli("quantize", folder, "--bits", "4", "-o", theirs)
    wanted = {tensor.name: tensor.data for tensor in GGUFReader(ours).tensors}
    found = {tensor.name: tensor.data for tensor in GGUFReader(theirs).tensors}
    assert found.keys() == wanted.keys()
    for name, data in wanted.items():
        np.testing.assert_array_equal(found[name], data)
